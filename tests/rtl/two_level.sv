// A narrow column (mac.sv) that sums a tile from zero, and a wide accumulator (combine in tile.sv)
// behind it.
module two_level #(
    parameter AW = 8,
    parameter WW = 8,
    parameter A_SIGNED = 1,
    parameter C = 1,
    parameter P = 1,
    parameter ACC = 20,
    parameter OVERFLOW = 0,
    parameter TREE = 0,
    parameter TREE_OVERFLOW = 0,
    parameter WIDE_ACC = 32,
    parameter WIDE_OVERFLOW = 0
) (
    input wire clk,
    input wire load,                 // start an output: the wide accumulator takes init
    input wire signed [WIDE_ACC-1:0] init,
    input wire start,                // start a tile: the column is cleared
    input wire valid,
    input wire [C*AW-1:0] a,
    input wire [C*WW-1:0] w,
    input wire merge,
    input wire add,                  // add the column to the wide accumulator
    output wire signed [WIDE_ACC-1:0] result,
    output wire [31:0] column_overflows,
    output wire [31:0] tree_overflows,
    output reg [31:0] overflows
);
    wire signed [ACC-1:0] partial;
    wire exceeds;

    mac #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .C(C), .P(P), .ACC(ACC), .OVERFLOW(OVERFLOW),
        .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW)
    ) column (
        .clk(clk), .load(start), .init({ACC{1'b0}}), .valid(valid), .a(a), .w(w), .merge(merge),
        .result(partial), .overflows(column_overflows), .tree_overflows(tree_overflows)
    );
    combine #(.ACC(ACC), .WIDE(WIDE_ACC), .OVERFLOW(WIDE_OVERFLOW)) sum (
        .clk(clk), .load(load), .init(init), .add(add), .partial(partial), .shift(1'b0),
        .result(result), .exceeds(exceeds)
    );

    always @(posedge clk) begin
        if (load) overflows <= 0;
        else if (add) overflows <= overflows + {31'd0, exceeds};
    end
endmodule
