// MACs whose precision changes while they run, as published ones are built: held against figures of
// Camus et al. 2019, Ryu et al. 2019 and Ibrahim et al. 2022, and in no array of this project.
// `mode` 0 takes one product of two signed 8-bit codes, 1 (LEVELS > 0) sums 4-bit ones, 2 (LEVELS
// > 1) 2-bit ones. Two stages: products, then an accumulator with 4 bits of headroom.

// One array of partial products. Narrow modes switch off all but the diagonal of blocks whose
// products fall on the same columns, which adds them: 2 of 4 bits at weight 2^4, 4 of 2 bits at 2^6.
(* keep_hierarchy *)
module subword #(
    parameter LEVELS = 2
) (
    input wire [7:0] a,
    input wire [7:0] w,
    input wire [1:0] mode,
    output wire signed [15:0] sum
);
    wire [1:0] at = (LEVELS == 0) ? 2'd0 : (LEVELS == 1) ? {1'b0, mode[0]} : mode;
    wire [7:0] row [0:7];
    genvar i, j;

    // Baugh and Wooley: bits beside a sign are turned over, and 2^n - 2^(2n-1) is added a block.
    generate
        for (i = 0; i < 8; i = i + 1) begin : rows
            for (j = 0; j < 8; j = j + 1) begin : bits
                wire on = (at == 0) || (at == 1 && i / 4 + j / 4 == 1)
                    || (at == 2 && i / 2 + j / 2 == 3);
                wire turned = (at == 0) ? (i == 7) != (j == 7)
                    : (at == 1) ? (i % 4 == 3) != (j % 4 == 3) : (i % 2 == 1) != (j % 2 == 1);
                assign row[i][j] = on & ((a[i] & w[j]) ^ turned);
            end
        end
    endgenerate
    wire [15:0] start = (at == 0) ? -16'd32512 : (at == 1) ? -16'd3584 : -16'd1024;
    assign sum = start + row[0] + (row[1] << 1) + (row[2] << 2) + (row[3] << 3)
        + (row[4] << 4) + (row[5] << 5) + (row[6] << 6) + (row[7] << 7);
endmodule

module subword_mac #(
    parameter LEVELS = 2
) (
    input wire clk,
    input wire load,
    input wire [1:0] mode,
    input wire [7:0] a,
    input wire [7:0] w,
    output reg signed [19:0] result
);
    wire signed [15:0] sum;
    reg signed [15:0] stage;
    subword #(.LEVELS(LEVELS)) multiplier (.a(a), .w(w), .mode(mode), .sum(sum));
    always @(posedge clk) begin
        stage <= sum;
        if (load) result <= 0;
        else result <= result + stage;
    end
endmodule

// A product of two digits of 2 bits, each signed or not.
(* keep_hierarchy *)
module brick (
    input wire [1:0] a,
    input wire [1:0] w,
    input wire a_signed,
    input wire w_signed,
    output wire signed [4:0] p
);
    wire signed [2:0] x = {a_signed & a[1], a};
    wire signed [2:0] y = {w_signed & w[1], w};
    assign p = x * y;
endmodule

// Signs of the bricks in each mode: of the highest digit of each code. Brick 4 * i + j takes digit
// i of a and j of w of an 8-bit product, 2 * (i / 2) + j / 2 is the block of 4 bits it lies in.
module digit_signs (
    input wire [1:0] mode,
    output wire [3:0] signs
);
    assign signs = {1'b1, mode == 2, mode != 0, mode == 2};
endmodule

// What stands at 16 places of bricks, added as the mode has it: in 8 bits each shifted by its place,
// in 4 bits by its place inside a block, in 2 bits not at all.
(* keep_hierarchy *)
module shift_add #(
    parameter W = 5
) (
    input wire [16*W-1:0] places,
    input wire [1:0] mode,
    output wire signed [W+10:0] sum,
    output wire [4*(W+4)-1:0] blocks
);
    wire signed [W-1:0] place [0:15];
    wire signed [W+3:0] block [0:3];
    wire narrow = mode == 2, whole = mode == 0;
    genvar b;
    generate
        for (b = 0; b < 16; b = b + 1) begin : inputs
            assign place[b] = places[W*b +: W];
        end
        for (b = 0; b < 4; b = b + 1) begin : inner
            localparam FIRST = 8 * (b / 2) + 2 * (b % 2);
            wire signed [W+3:0] low = place[FIRST];
            wire signed [W+3:0] right = narrow ? place[FIRST + 1] : place[FIRST + 1] <<< 2;
            wire signed [W+3:0] up = narrow ? place[FIRST + 4] : place[FIRST + 4] <<< 2;
            wire signed [W+3:0] high = narrow ? place[FIRST + 5] : place[FIRST + 5] <<< 4;
            assign block[b] = low + right + up + high;
            assign blocks[(W+4)*b +: W+4] = block[b];
        end
    endgenerate
    wire signed [W+10:0] block_1 = whole ? block[1] <<< 4 : block[1];
    wire signed [W+10:0] block_2 = whole ? block[2] <<< 4 : block[2];
    wire signed [W+10:0] block_3 = whole ? block[3] <<< 8 : block[3];
    assign sum = block[0] + block_1 + block_2 + block_3;
endmodule

// Sixteen bricks, their products shifted and added: one product of 8 bits, the sum of four of 4 or
// of sixteen of 2 bits (Bit Fusion; 2D divide and conquer, sum together).
(* keep_hierarchy *)
module fusion (
    input wire [31:0] a,             // digits of brick 0 in the low bits
    input wire [31:0] w,
    input wire [1:0] mode,
    output wire signed [15:0] sum,
    output wire [4*9-1:0] blocks,    // sums of four bricks, for designs that keep them apart
    output wire [16*5-1:0] products
);
    wire [3:0] signs;
    genvar b;
    digit_signs of_digits (.mode(mode), .signs(signs));
    generate
        for (b = 0; b < 16; b = b + 1) begin : bricks
            brick one (.a(a[2*b +: 2]), .w(w[2*b +: 2]), .a_signed(signs[b / 4]),
                       .w_signed(signs[b % 4]), .p(products[5*b +: 5]));
        end
    endgenerate
    shift_add #(.W(5)) once (.places(products), .mode(mode), .sum(sum), .blocks(blocks));
endmodule

// N fusion units whose sums are added into one accumulator.
module fused_mac #(
    parameter N = 1
) (
    input wire clk,
    input wire load,
    input wire [1:0] mode,
    input wire [32*N-1:0] a,
    input wire [32*N-1:0] w,
    output reg signed [19+$clog2(N):0] result
);
    wire [16*N-1:0] sums;
    wire signed [15+$clog2(N):0] sum;
    reg signed [15+$clog2(N):0] stage;
    genvar k;
    generate
        for (k = 0; k < N; k = k + 1) begin : units
            fusion unit (.a(a[32*k +: 32]), .w(w[32*k +: 32]), .mode(mode),
                         .sum(sums[16*k +: 16]), .blocks(), .products());
        end
        if (N == 1) begin : single
            assign sum = sums;
        end else begin : several
            tree #(.N(N), .W(16)) adders (.x(sums), .sum(sum));
        end
    endgenerate
    always @(posedge clk) begin
        stage <= sum;
        if (load) result <= 0;
        else result <= result + stage;
    end
endmodule

// N products at once, bricks of one place added first and shifted once (BitBlade).
module bitwise_mac #(
    parameter N = 16
) (
    input wire clk,
    input wire load,
    input wire [1:0] mode,
    input wire [32*N-1:0] a,
    input wire [32*N-1:0] w,
    output reg signed [19+$clog2(N):0] result
);
    localparam PLACE = 5 + $clog2(N);
    localparam WIDE = 16 + $clog2(N);
    wire [3:0] signs;
    wire [16*PLACE-1:0] places;
    wire signed [WIDE-1:0] sum;
    reg signed [WIDE-1:0] stage;
    genvar b, k;
    digit_signs of_digits (.mode(mode), .signs(signs));
    generate
        for (b = 0; b < 16; b = b + 1) begin : place
            wire [5*N-1:0] products;
            for (k = 0; k < N; k = k + 1) begin : bricks
                brick one (.a(a[32*k + 2*b +: 2]), .w(w[32*k + 2*b +: 2]),
                           .a_signed(signs[b / 4]), .w_signed(signs[b % 4]),
                           .p(products[5*k +: 5]));
            end
            tree #(.N(N), .W(5)) adders (.x(products), .sum(places[PLACE*b +: PLACE]));
        end
    endgenerate
    shift_add #(.W(PLACE)) once (.places(places), .mode(mode), .sum(sum), .blocks());
    always @(posedge clk) begin
        stage <= sum;
        if (load) result <= 0;
        else result <= result + stage;
    end
endmodule

// Sixteen bricks whose narrow products go to accumulators of their own: 16 of 8 bits, 4 of 12 or
// one of 20, in the same registers (2D divide and conquer, sum apart).
module apart_mac (
    input wire clk,
    input wire load,
    input wire [1:0] mode,
    input wire [31:0] a,
    input wire [31:0] w,
    output reg [127:0] result
);
    wire signed [15:0] sum;
    wire [35:0] blocks;
    wire [79:0] products;
    wire [127:0] narrow, middle, added;
    reg [127:0] stage;
    wire [127:0] total;
    wire [16:0] carry;
    genvar b;
    fusion unit (.a(a), .w(w), .mode(mode), .sum(sum), .blocks(blocks), .products(products));
    generate
        for (b = 0; b < 16; b = b + 1) begin : lanes
            assign narrow[8*b +: 8] = {{3{products[5*b + 4]}}, products[5*b +: 5]};
        end
        for (b = 0; b < 4; b = b + 1) begin : quads
            assign middle[32*b +: 32] = {{23{blocks[9*b + 8]}}, blocks[9*b +: 9]};
        end
    endgenerate
    assign added = mode == 0 ? {{112{sum[15]}}, sum} : mode == 1 ? middle : narrow;
    // Carries stop where one accumulator ends.
    assign carry[0] = 1'b0;
    generate
        for (b = 0; b < 16; b = b + 1) begin : adders
            wire over;
            assign {over, total[8*b +: 8]} = result[8*b +: 8] + stage[8*b +: 8] + carry[b];
            assign carry[b + 1] = over & (mode == 0 || (mode == 1 && (b + 1) % 4 != 0));
        end
    endgenerate
    always @(posedge clk) begin
        stage <= added;
        if (load) result <= 0;
        else result <= total;
    end
endmodule
