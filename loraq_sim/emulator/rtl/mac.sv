// A MAC column: C products summed in a tree, one add per cycle into one of P accumulators in turn,
// then P - 1 merges into accumulator 0, in order. Overflow rules: 0 wrap, 1 saturate,
// 2 saturate_symmetric. TREE = 0 means an exact tree.
module mac #(
    parameter AW = 8,
    parameter WW = 8,
    parameter A_SIGNED = 1,
    parameter W_SIGNED = 1,
    parameter C = 1,
    parameter P = 1,
    parameter ACC = 32,
    parameter OVERFLOW = 0,
    parameter TREE = 0,
    parameter TREE_OVERFLOW = 0
) (
    input wire clk,
    input wire load,                 // start an output: accumulator 0 takes init, the others zero
    input wire signed [ACC-1:0] init,
    input wire valid,                // one chunk of operands, operand 0 in the low bits
    input wire [C*AW-1:0] a,
    input wire [C*WW-1:0] w,
    input wire merge,                // merge the next accumulator into accumulator 0
    output wire signed [ACC-1:0] result,
    output reg [31:0] overflows,
    output reg [31:0] tree_overflows
);
    // Holds a 64-bit accumulator plus any chunk sum (at most 64 * 2**15 * 255 in magnitude).
    localparam WIDE = 72;

    reg signed [ACC-1:0] acc [0:P-1];
    reg signed [WIDE-1:0] chunk, kept, total;
    reg signed [AW:0] x;
    reg signed [WW:0] y;
    integer turn, next, i;

    assign result = acc[0];

    function signed [WIDE-1:0] fit(
        input signed [WIDE-1:0] value, input integer bits, input integer rule
    );
        reg signed [WIDE-1:0] top, bottom;
        begin
            top = (72'sd1 <<< (bits - 1)) - 72'sd1;
            bottom = (rule == 2) ? -top : -top - 72'sd1;
            if (rule == 0) fit = (value <<< (WIDE - bits)) >>> (WIDE - bits);
            else if (value > top) fit = top;
            else if (value < bottom) fit = bottom;
            else fit = value;
        end
    endfunction

    always @(posedge clk) begin
        if (load) begin
            for (i = 0; i < P; i = i + 1) acc[i] = 0;
            acc[0] = init;
            turn = 0;
            next = 1;
            overflows = 0;
            tree_overflows = 0;
        end else if (valid) begin
            chunk = 0;
            for (i = 0; i < C; i = i + 1) begin
                x = {A_SIGNED ? a[AW*i+AW-1] : 1'b0, a[AW*i +: AW]};
                y = {W_SIGNED ? w[WW*i+WW-1] : 1'b0, w[WW*i +: WW]};
                chunk = chunk + x * y;
            end
            kept = (TREE == 0) ? chunk : fit(chunk, TREE, TREE_OVERFLOW);
            if (kept != chunk) tree_overflows = tree_overflows + 1;
            total = acc[turn] + kept;
            acc[turn] = fit(total, ACC, OVERFLOW);
            if (acc[turn] != total) overflows = overflows + 1;
            turn = (turn == P - 1) ? 0 : turn + 1;
        end else if (merge) begin
            total = acc[0];
            total = total + acc[next];
            acc[0] = fit(total, ACC, OVERFLOW);
            if (acc[0] != total) overflows = overflows + 1;
            next = next + 1;
        end
    end
endmodule
