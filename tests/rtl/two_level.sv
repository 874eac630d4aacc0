// A narrow column (mac.sv) that sums a tile from zero, and a wide accumulator behind it.
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
    output reg signed [WIDE_ACC-1:0] result,
    output wire [31:0] column_overflows,
    output wire [31:0] tree_overflows,
    output reg [31:0] overflows
);
    wire signed [ACC-1:0] partial;
    reg signed [71:0] total, top, bottom;

    mac #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .C(C), .P(P), .ACC(ACC), .OVERFLOW(OVERFLOW),
        .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW)
    ) column (
        .clk(clk), .load(start), .init({ACC{1'b0}}), .valid(valid), .a(a), .w(w), .merge(merge),
        .result(partial), .overflows(column_overflows), .tree_overflows(tree_overflows)
    );

    always @(posedge clk) begin
        if (load) begin
            result = init;
            overflows = 0;
        end else if (add) begin
            total = result;
            total = total + partial;
            top = (72'sd1 <<< (WIDE_ACC - 1)) - 72'sd1;
            bottom = (WIDE_OVERFLOW == 2) ? -top : -top - 72'sd1;
            if (total > top || total < bottom) begin
                if (WIDE_OVERFLOW == 0) begin
                    result = total[WIDE_ACC-1:0];
                end else begin
                    result = (total > top) ? top[WIDE_ACC-1:0] : bottom[WIDE_ACC-1:0];
                end
                overflows = overflows + 1;
            end else begin
                result = total[WIDE_ACC-1:0];
            end
        end
    end
endmodule
