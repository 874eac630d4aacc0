// Shift, round, saturate with guard, sticky and sign bits (AMD UG1583; codes of AIE-ML and AIE2P).
module srs #(
    parameter ACC = 32,
    parameter OUT = 8,
    parameter OUT_SIGNED = 1,
    parameter MODES = 16'b0011_1111_0000_1111  // the rounding codes that are built
) (
    input wire signed [ACC-1:0] acc,
    input wire signed [6:0] shift,   // -4 to 59; negative shifts left
    input wire [3:0] rounding,
    input wire [1:0] saturation,     // 0 none, 1 saturate, 3 symmetric
    output reg [OUT-1:0] out
);
    // A shift of 4 to the left, the increment, and the top of an unsigned output.
    localparam WIDE = ((ACC > OUT) ? ACC : OUT) + 6;
    // One mode needs no selection. Of several, a code that is not built rounds down.
    localparam ONLY = (MODES & (MODES - 1)) == 0;
    localparam [3:0] MODE = $clog2(MODES);

    reg signed [WIDE-1:0] value, half, q, rounded, top, bottom;
    reg [5:0] below;
    reg grd, stk, lsb, sgn, inc;

    always @* begin
        value = acc;
        sgn = acc[ACC-1];
        below = shift[5:0] - 6'd1;
        if (shift[6] || shift == 7'd0) begin
            half = 0;
            q = value <<< (-shift);
            grd = 0;
            stk = 0;
        end else begin
            // The guard bit is the last one shifted out; beyond the value's bits it is the sign.
            half = value >>> below;
            q = half >>> 1;
            grd = half[0];
            stk = (value & ~({WIDE{1'b1}} << below)) != 0;
        end
        lsb = q[0];
        case (ONLY ? MODE : rounding)
            4'd0: inc = 0;
            4'd1: inc = MODES[1] & (grd | stk);
            4'd2: inc = MODES[2] & sgn & (grd | stk);
            4'd3: inc = MODES[3] & ~sgn & (grd | stk);
            4'd8: inc = MODES[8] & grd & stk;
            4'd9: inc = MODES[9] & grd;
            4'd10: inc = MODES[10] & grd & (sgn | stk);
            4'd11: inc = MODES[11] & grd & (~sgn | stk);
            4'd12: inc = MODES[12] & grd & (lsb | stk);
            4'd13: inc = MODES[13] & grd & (~lsb | stk);
            default: inc = 1'bx;
        endcase
        rounded = q + $signed({1'b0, inc});
        top = {{(WIDE - 1){1'b0}}, 1'b1};
        top = (top <<< (OUT_SIGNED ? OUT - 1 : OUT)) - $signed(2'b01);
        bottom = !OUT_SIGNED ? {WIDE{1'b0}} : (saturation == 2'd3) ? -top : ~top;
        if (saturation == 2'd0) out = rounded[OUT-1:0];
        else if (rounded > top) out = top[OUT-1:0];
        else if (rounded < bottom) out = bottom[OUT-1:0];
        else out = rounded[OUT-1:0];
    end
endmodule
