// A MAC column: C products summed in a tree, one add per cycle into one of P accumulators in turn,
// then P - 1 merges into accumulator 0, in order. Overflow rules: 0 wrap, 1 saturate,
// 2 saturate_symmetric. TREE = 0 means an exact tree. Every wire is as wide as its values need, and
// multiplier, tree and clamp are modules of their own, so that synthesis can keep and price them.
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
    // A product of two unsigned operands needs a sign bit of its own.
    localparam PRODUCT = AW + WW + (A_SIGNED == 0 && W_SIGNED == 0);
    localparam CHUNK = PRODUCT + $clog2(C);
    localparam KEPT = (TREE == 0 || TREE > CHUNK) ? CHUNK : TREE;
    localparam TOTAL = ((KEPT > ACC) ? KEPT : ACC) + 1;
    localparam TURN = (P > 1) ? $clog2(P) : 1;

    reg signed [ACC-1:0] acc [0:P-1];
    reg [TURN-1:0] turn, next;
    wire [C*PRODUCT-1:0] products;
    wire signed [CHUNK-1:0] chunk;
    wire signed [KEPT-1:0] kept;
    wire signed [TOTAL-1:0] total;
    wire signed [ACC-1:0] sum;
    wire exceeds, tree_exceeds;
    integer p;

    genvar i;
    generate
        for (i = 0; i < C; i = i + 1) begin : lane
            product #(.AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED)) multiplier (
                .a(a[AW*i +: AW]), .w(w[WW*i +: WW]), .p(products[PRODUCT*i +: PRODUCT])
            );
        end
        if (C == 1) begin : single
            assign chunk = products;
        end else begin : several
            tree #(.N(C), .W(PRODUCT)) adders (.x(products), .sum(chunk));
        end
    endgenerate
    clamp #(.IN(CHUNK), .OUT(KEPT), .RULE(TREE == 0 ? 0 : TREE_OVERFLOW)) narrow_tree (
        .x(chunk), .y(kept), .exceeds(tree_exceeds)
    );

    // One adder: a chunk into the accumulator whose turn it is, or the next one into the first.
    generate
        if (P == 1) begin : alone
            assign total = acc[0] + kept;
        end else begin : in_turn
            wire signed [ACC-1:0] kept_by = merge ? acc[0] : acc[turn];
            wire signed [TOTAL-2:0] added = merge ? acc[next] : kept;
            assign total = kept_by + added;
        end
    endgenerate
    clamp #(.IN(TOTAL), .OUT(ACC), .RULE(OVERFLOW)) narrow_sum (
        .x(total), .y(sum), .exceeds(exceeds)
    );

    assign result = acc[0];

    always @(posedge clk) begin
        if (load) begin
            for (p = 1; p < P; p = p + 1) acc[p] <= 0;
            acc[0] <= init;
            turn <= 0;
            next <= 1;
            overflows <= 0;
            tree_overflows <= 0;
        end else if (merge && P > 1) begin
            acc[0] <= sum;
            next <= next + 1'b1;
            overflows <= overflows + {31'd0, exceeds};
        end else if (valid) begin
            acc[turn] <= sum;
            turn <= (turn == P - 1) ? {TURN{1'b0}} : turn + 1'b1;
            overflows <= overflows + {31'd0, exceeds};
            tree_overflows <= tree_overflows + {31'd0, tree_exceeds};
        end
    end
endmodule

// The exact product of two codes, each signed or unsigned.
(* keep_hierarchy *)
module product #(
    parameter AW = 8,
    parameter WW = 8,
    parameter A_SIGNED = 1,
    parameter W_SIGNED = 1,
    parameter OUT = AW + WW + (A_SIGNED == 0 && W_SIGNED == 0)
) (
    input wire [AW-1:0] a,
    input wire [WW-1:0] w,
    output wire [OUT-1:0] p
);
    generate
        if (A_SIGNED != 0 && W_SIGNED != 0) begin : both
            assign p = $signed(a) * $signed(w);
        end else if (A_SIGNED != 0) begin : signed_a
            wire signed [WW:0] y = {1'b0, w};
            assign p = $signed(a) * y;
        end else if (W_SIGNED != 0) begin : signed_w
            wire signed [AW:0] x = {1'b0, a};
            assign p = x * $signed(w);
        end else begin : neither
            wire [AW+WW-1:0] magnitude = a * w;
            assign p = {1'b0, magnitude};
        end
    endgenerate
endmodule

// The exact sum of N signed values: a balanced tree, each adder one bit wider than what it adds.
(* keep_hierarchy *)
module tree #(
    parameter N = 2,
    parameter W = 16,
    parameter OUT = W + $clog2(N)
) (
    input wire [N*W-1:0] x,
    output wire signed [OUT-1:0] sum
);
    localparam LEFT = 1 << ($clog2(N) - 1);
    localparam RIGHT = N - LEFT;
    wire signed [OUT-2:0] left;
    wire signed [W+$clog2(RIGHT)-1:0] right;

    generate
        if (LEFT == 1) begin : left_leaf
            assign left = x[W-1:0];
        end else begin : left_tree
            tree #(.N(LEFT), .W(W)) adders (.x(x[LEFT*W-1:0]), .sum(left));
        end
        if (RIGHT == 1) begin : right_leaf
            assign right = x[LEFT*W +: W];
        end else begin : right_tree
            tree #(.N(RIGHT), .W(W)) adders (.x(x[LEFT*W +: RIGHT*W]), .sum(right));
        end
    endgenerate
    assign sum = left + right;
endmodule

// A signed value in OUT bits under an overflow rule, and whether it did not fit.
(* keep_hierarchy *)
module clamp #(
    parameter IN = 33,
    parameter OUT = 32,
    parameter RULE = 0
) (
    input wire signed [IN-1:0] x,
    output wire signed [OUT-1:0] y,
    output wire exceeds
);
    localparam SPARE = IN - OUT;
    wire signed [OUT-1:0] low = x[OUT-1:0];
    wire [OUT-1:0] lowest = {1'b1, {(OUT - 1){1'b0}}};
    wire wide, bottom;

    generate
        if (SPARE == 0) begin : fits
            assign wide = 1'b0;
        end else begin : narrows
            assign wide = x[IN-1:OUT] != {SPARE{x[OUT-1]}};
        end
        if (RULE == 2) begin : symmetric
            assign bottom = low == lowest;
        end else begin : full
            assign bottom = 1'b0;
        end
        if (RULE == 0) begin : wrap
            assign y = low;
        end else begin : saturate
            // The lowest value is the highest with every bit turned over, plus one if symmetric.
            wire [OUT-1:0] limit = {x[IN-1], {(OUT - 1){~x[IN-1]}}};
            assign y = wide ? (RULE == 2 ? (limit | {{(OUT - 1){1'b0}}, 1'b1}) : limit)
                            : (low | {{(OUT - 1){1'b0}}, bottom});
        end
    endgenerate
    assign exceeds = wide | bottom;
endmodule
