// Shift left into an accumulator. Modes: 0 wrap, 1 clamp the shifted value, 2 clamp the input to the
// limits shifted right, then shift (AMD UG1583's pseudo-code).
module ups #(
    parameter IN = 8,
    parameter IN_SIGNED = 1,
    parameter ACC = 32
) (
    input wire [IN-1:0] x,
    input wire [5:0] shift,
    input wire [1:0] mode,
    output reg [ACC-1:0] acc
);
    localparam WIDE = 136;

    reg signed [WIDE-1:0] value, top, bottom, shifted;

    always @* begin
        value = {{(WIDE - IN){IN_SIGNED ? x[IN-1] : 1'b0}}, x};
        top = (136'sd1 <<< (ACC - 1)) - 136'sd1;
        bottom = -top - 136'sd1;
        if (mode == 2'd2) begin
            if (value > (top >>> shift)) value = top >>> shift;
            else if (value < (bottom >>> shift)) value = bottom >>> shift;
        end
        shifted = value <<< shift;
        if (mode == 2'd1 && shifted > top) shifted = top;
        else if (mode == 2'd1 && shifted < bottom) shifted = bottom;
        acc = shifted[ACC-1:0];
    end
endmodule
