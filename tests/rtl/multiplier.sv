// Fixed-point multiplier requantization of an int32 accumulator, gemmlowp's two roundings or one.
module multiplier #(
    parameter OUT = 8,
    parameter OUT_SIGNED = 1
) (
    input wire signed [31:0] acc,
    input wire signed [31:0] factor,
    input wire signed [6:0] exponent,   // two roundings: -31 to 30
    input wire [5:0] shift,             // one rounding: 1 to 62
    input wire [OUT-1:0] zero_point,
    output reg [OUT-1:0] twice,
    output reg [OUT-1:0] once
);
    reg signed [71:0] product, quotient, value;
    reg [71:0] dropped;
    reg sign, guard;

    function [OUT-1:0] finish(input signed [71:0] rounded);
        reg signed [71:0] sum, top, bottom;
        begin
            sum = rounded;
            if (sum > 72'sd2147483647) sum = 72'sd2147483647;
            if (sum < -72'sd2147483648) sum = -72'sd2147483648;
            sum = sum + (OUT_SIGNED ? $signed({{(72 - OUT){zero_point[OUT-1]}}, zero_point})
                                    : $signed({{(72 - OUT){1'b0}}, zero_point}));
            top = (72'sd1 <<< (OUT_SIGNED ? OUT - 1 : OUT)) - 72'sd1;
            bottom = OUT_SIGNED ? -top - 72'sd1 : 72'sd0;
            if (sum > top) sum = top;
            if (sum < bottom) sum = bottom;
            finish = sum[OUT-1:0];
        end
    endfunction

    always @* begin
        // A 32 x 32-bit multiplier and an adder of half: the carry into bit 31 rounds ties upward.
        product = acc;
        if (exponent > 0) product = product <<< exponent;
        product = product * factor;
        quotient = (product + (72'sd1 <<< 30)) >>> 31;
        if (quotient > 72'sd2147483647) quotient = 72'sd2147483647;
        // The guard bit of the magnitude rounds ties away from zero.
        sign = quotient < 72'sd0;
        value = sign ? -quotient : quotient;
        if (exponent < 0) begin
            dropped = value & ((72'd1 << (-exponent)) - 72'd1);
            guard = dropped[-exponent-1];
            value = (value >>> (-exponent)) + {71'd0, guard};
        end
        twice = finish(sign ? -value : value);

        product = acc;
        product = product * factor;
        once = finish((product + (72'sd1 <<< (shift - 6'd1))) >>> shift);
    end
endmodule
