// Design under test: the reference MAC column (mac.sv) and shift-round-saturate (srs.sv).
// Replace this module by your own; keep its name, parameters and ports, and the testbench will
// drive it: `start` for one cycle, then chunks of C operands while `valid`, `last` with the final
// one (zeros fill a short chunk); then it waits, any number of cycles up to its timeout, for `done`.
module dut #(
    parameter AW = 8,              // operand widths, two's complement
    parameter WW = 8,
    parameter C = 1,               // products per add
    parameter P = 1,               // partial accumulators, fed in turn, merged in order
    parameter ACC = 32,            // accumulator width
    parameter OVERFLOW = 0,        // 0 wrap, 1 saturate, 2 saturate_symmetric
    parameter TREE = 0,            // width of the sum of a chunk; 0 is exact
    parameter TREE_OVERFLOW = 0,
    parameter OUT = 8,             // output width, two's complement
    parameter SHIFT = 0,           // -4 to 59; negative shifts left
    parameter ROUNDING = 12,       // AIE-ML codes: 0 floor ... 12 conv_even, 13 conv_odd
    parameter SATURATION = 1       // 0 none, 1 saturate, 3 symmetric
) (
    input wire clk,
    input wire start,              // clear the accumulators
    input wire valid,
    input wire last,
    input wire [C*AW-1:0] a,       // operand 0 in the low bits
    input wire [C*WW-1:0] w,
    output reg done,
    output wire signed [ACC-1:0] acc,
    output wire signed [OUT-1:0] out
);
    reg merging;
    reg [6:0] merged;
    wire [31:0] overflows, tree_overflows;

    mac #(
        .AW(AW), .WW(WW), .A_SIGNED(1), .C(C), .P(P), .ACC(ACC), .OVERFLOW(OVERFLOW),
        .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW)
    ) column (
        .clk(clk), .load(start), .init({ACC{1'b0}}), .valid(valid), .a(a), .w(w),
        .merge(merging), .result(acc), .overflows(overflows), .tree_overflows(tree_overflows)
    );
    srs #(.ACC(ACC), .OUT(OUT), .OUT_SIGNED(1)) narrow (
        .acc(acc), .shift(SHIFT[6:0]), .rounding(ROUNDING[3:0]), .saturation(SATURATION[1:0]),
        .out(out)
    );

    always @(posedge clk) begin
        if (start) begin
            done <= 0;
            merging <= 0;
            merged <= 0;
        end else if (valid && last) begin
            done <= (P == 1);
            merging <= (P > 1);
        end else if (merging) begin
            merged <= merged + 1;
            if (merged == P - 2) begin
                done <= 1;
                merging <= 0;
            end
        end
    end
endmodule
