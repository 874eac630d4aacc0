// Design under test: the reference MAC column (mac.sv) and shift-round-saturate (srs.sv).
// Replace this module by your own; keep its name, parameters and ports, and the testbench will
// drive it: `start` for one cycle, with `init`, then chunks of C operands while `valid`, `last` with
// the final one (zeros fill a short chunk); then it waits, any number of cycles up to its timeout,
// for `done`. `init` is what zero points take off an output, exactly: where the accumulator starts,
// under its overflow rule, or (AFTER) what is added behind it in 64 bits.
module dut #(
    parameter AW = 8,              // operand widths, two's complement or unsigned
    parameter WW = 8,
    parameter A_SIGNED = 1,
    parameter W_SIGNED = 1,
    parameter AFTER = 0,           // 1 adds init behind the accumulator
    parameter RESULT = 32,         // width of acc: ACC, or 64 with AFTER
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
    input wire start,              // clear the accumulators, take init
    input wire signed [63:0] init,
    input wire valid,
    input wire last,
    input wire [C*AW-1:0] a,       // operand 0 in the low bits
    input wire [C*WW-1:0] w,
    output reg done,
    output wire signed [RESULT-1:0] acc,
    output wire signed [OUT-1:0] out
);
    reg merging;
    reg [6:0] merged;
    wire [31:0] overflows, tree_overflows;
    wire signed [ACC-1:0] sum;
    reg signed [63:0] first, behind, top, bottom;

    // The initial value under the overflow rule of the accumulator.
    always @* begin
        top = (64'sd1 <<< (ACC - 1)) - 64'sd1;
        bottom = (OVERFLOW == 2) ? -top : -top - 64'sd1;
        first = init;
        if (AFTER != 0) first = 0;
        else if (OVERFLOW != 0 && init > top) first = top;
        else if (OVERFLOW != 0 && init < bottom) first = bottom;
    end

    mac #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED), .C(C), .P(P), .ACC(ACC),
        .OVERFLOW(OVERFLOW), .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW)
    ) column (
        .clk(clk), .load(start), .init(first[ACC-1:0]), .valid(valid), .a(a), .w(w),
        .merge(merging), .result(sum), .overflows(overflows), .tree_overflows(tree_overflows)
    );
    always @(posedge clk) if (start) behind <= (AFTER != 0) ? init : 64'sd0;
    wire signed [63:0] corrected = sum + behind;
    assign acc = corrected[RESULT-1:0];
    srs #(.ACC(RESULT), .OUT(OUT), .OUT_SIGNED(1)) narrow (
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
