// Shift, round, saturate with guard, sticky and sign bits (AMD UG1583; codes of AIE-ML and AIE2P).
module srs #(
    parameter ACC = 32,
    parameter OUT = 8,
    parameter OUT_SIGNED = 1
) (
    input wire signed [ACC-1:0] acc,
    input wire signed [6:0] shift,   // -4 to 59; negative shifts left
    input wire [3:0] rounding,
    input wire [1:0] saturation,     // 0 none, 1 saturate, 3 symmetric
    output reg [OUT-1:0] out
);
    localparam WIDE = 72;

    reg signed [WIDE-1:0] value, q, rounded, top, bottom;
    reg [WIDE-1:0] dropped;
    reg grd, stk, lsb, sgn, inc;

    always @* begin
        value = acc;
        sgn = value < 72'sd0;
        if (shift <= 0) begin
            q = value <<< (-shift);
            grd = 0;
            stk = 0;
        end else begin
            q = value >>> shift;
            dropped = value - (q <<< shift);
            grd = dropped[shift-1];
            stk = (dropped & ((72'd1 << (shift - 1)) - 72'd1)) != 0;
        end
        lsb = q[0];
        case (rounding)
            4'd0: inc = 0;
            4'd1: inc = grd | stk;
            4'd2: inc = sgn & (grd | stk);
            4'd3: inc = ~sgn & (grd | stk);
            4'd8: inc = grd & stk;
            4'd9: inc = grd;
            4'd10: inc = grd & (sgn | stk);
            4'd11: inc = grd & (~sgn | stk);
            4'd12: inc = grd & (lsb | stk);
            4'd13: inc = grd & (~lsb | stk);
            default: inc = 1'bx;
        endcase
        rounded = inc ? q + 72'sd1 : q;
        top = (72'sd1 <<< (OUT_SIGNED ? OUT - 1 : OUT)) - 72'sd1;
        bottom = !OUT_SIGNED ? 72'sd0 : (saturation == 2'd3) ? -top : -top - 72'sd1;
        if (saturation == 2'd0) out = rounded[OUT-1:0];
        else if (rounded > top) out = top[OUT-1:0];
        else if (rounded < bottom) out = bottom[OUT-1:0];
        else out = rounded[OUT-1:0];
    end
endmodule
