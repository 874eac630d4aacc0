// What an array is built of: columns (mac.sv) that share the operands of one row, their results
// drained through one shift-round-saturate, and the adder that combines the groups of a product.
// ZERO_POINT = 1 lets an accumulator start at `init` (what zero points take off an output);
// 0 starts every output at zero, which needs an AND a bit instead of a multiplexer. Operands of zero
// stand where there are none, so that no accumulator needs to be held: a column adds every cycle.
module column #(
    parameter AW = 8,
    parameter WW = 8,
    parameter A_SIGNED = 1,
    parameter W_SIGNED = 1,
    parameter C = 1,
    parameter P = 1,
    parameter ACC = 32,
    parameter OVERFLOW = 0,
    parameter TREE = 0,
    parameter TREE_OVERFLOW = 0,
    parameter ZERO_POINT = 0
) (
    input wire clk,
    input wire load,
    input wire signed [ACC-1:0] init,
    input wire [C*AW-1:0] a,
    input wire [C*WW-1:0] w,
    input wire merge,
    output wire signed [ACC-1:0] result
);
    wire [31:0] overflows, tree_overflows;
    wire signed [ACC-1:0] first = (ZERO_POINT != 0) ? init : {ACC{1'b0}};

    // Counts of overflows are for the testbench: nothing reads them here, so none are built.
    mac #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED), .C(C), .P(P), .ACC(ACC),
        .OVERFLOW(OVERFLOW), .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW)
    ) array (
        .clk(clk), .load(load), .init(first), .valid(1'b1),
        .a(a), .w(w), .merge(P > 1 ? merge : 1'b0), .result(result), .overflows(overflows),
        .tree_overflows(tree_overflows)
    );
endmodule

// The sum over groups: a column's result, shifted by the exponents of its group's scales, added to
// an accumulator of its own under its own overflow rule.
module combine #(
    parameter ACC = 20,
    parameter SHIFTS = 0,            // bits of `shift`; 0 adds without shifting
    parameter WIDE = 32,
    parameter OVERFLOW = 0
) (
    input wire clk,
    input wire load,                 // start an output at init
    input wire signed [WIDE-1:0] init,
    input wire add,
    input wire signed [ACC-1:0] partial,
    input wire [(SHIFTS > 0 ? SHIFTS : 1)-1:0] shift,
    output reg signed [WIDE-1:0] result,
    output wire exceeds              // this add does not fit
);
    localparam SHIFTED = ACC + (SHIFTS > 0 ? (1 << SHIFTS) - 1 : 0);
    localparam TOTAL = ((SHIFTED > WIDE) ? SHIFTED : WIDE) + 1;
    wire signed [SHIFTED-1:0] whole = partial;
    wire signed [SHIFTED-1:0] shifted = (SHIFTS > 0) ? whole <<< shift : whole;
    wire signed [TOTAL-1:0] total = result + shifted;
    wire signed [WIDE-1:0] sum;

    clamp #(.IN(TOTAL), .OUT(WIDE), .RULE(OVERFLOW)) narrow (
        .x(total), .y(sum), .exceeds(exceeds)
    );
    always @(posedge clk) begin
        if (load) result <= init;
        else if (add) result <= sum;
    end
endmodule

// COLUMNS columns beside each other: one set of activations, a set of weights each. `drain` is the
// column whose result the shift-round-saturate sees.
module tile #(
    parameter COLUMNS = 4,
    parameter AW = 8,
    parameter WW = 8,
    parameter A_SIGNED = 1,
    parameter W_SIGNED = 1,
    parameter C = 1,
    parameter P = 1,
    parameter ACC = 32,
    parameter OVERFLOW = 0,
    parameter TREE = 0,
    parameter TREE_OVERFLOW = 0,
    parameter ZERO_POINT = 1,
    parameter OUT = 8,
    parameter OUT_SIGNED = 1,
    parameter MODES = 16'b0011_1111_0000_1111
) (
    input wire clk,
    input wire load,
    input wire [COLUMNS*ACC-1:0] init,
    input wire [C*AW-1:0] a,
    input wire [COLUMNS*C*WW-1:0] w,
    input wire merge,
    input wire [(COLUMNS > 1 ? $clog2(COLUMNS) : 1)-1:0] drain,
    input wire signed [6:0] shift,
    input wire [3:0] rounding,
    input wire [1:0] saturation,
    output wire signed [ACC-1:0] acc,
    output wire [OUT-1:0] out
);
    wire [COLUMNS*ACC-1:0] results;
    genvar i;

    generate
        for (i = 0; i < COLUMNS; i = i + 1) begin : lane
            column #(
                .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED), .C(C), .P(P),
                .ACC(ACC), .OVERFLOW(OVERFLOW), .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW),
                .ZERO_POINT(ZERO_POINT)
            ) sums (
                .clk(clk), .load(load), .init(init[ACC*i +: ACC]), .a(a),
                .w(w[C*WW*i +: C*WW]), .merge(merge), .result(results[ACC*i +: ACC])
            );
        end
    endgenerate
    assign acc = results[ACC*drain +: ACC];
    srs #(.ACC(ACC), .OUT(OUT), .OUT_SIGNED(OUT_SIGNED), .MODES(MODES)) narrow (
        .acc(acc), .shift(shift), .rounding(rounding), .saturation(saturation), .out(out)
    );
endmodule
