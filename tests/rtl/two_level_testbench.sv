// Run ROWS x COLS dot products of TILES tiles of CHUNKS chunks each through two_level.sv.
// Reads a.hex (ROWS * TILES * CHUNKS words), w.hex and init.hex; writes result.hex, one line per
// output: accumulator, wide overflows, column overflows, tree overflows.
`timescale 1ns / 1ps
module two_level_testbench #(
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
    parameter WIDE_OVERFLOW = 0,
    parameter ROWS = 1,
    parameter COLS = 1,
    parameter TILES = 1,
    parameter CHUNKS = 1
);
    localparam WORDS = TILES * CHUNKS;

    reg clk = 0, load = 0, start = 0, valid = 0, merge = 0, add = 0;
    reg [C*AW-1:0] a_words [0:ROWS*WORDS-1];
    reg [C*WW-1:0] w_words [0:COLS*WORDS-1];
    reg [WIDE_ACC-1:0] init_words [0:ROWS*COLS-1];
    reg [C*AW-1:0] a;
    reg [C*WW-1:0] w;
    reg [WIDE_ACC-1:0] init;
    wire signed [WIDE_ACC-1:0] result;
    wire [31:0] overflows, column_overflows, tree_overflows;
    reg [31:0] all_column_overflows, all_tree_overflows;
    integer row, col, tile, chunk, p, file;

    two_level #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .C(C), .P(P), .ACC(ACC), .OVERFLOW(OVERFLOW),
        .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW), .WIDE_ACC(WIDE_ACC),
        .WIDE_OVERFLOW(WIDE_OVERFLOW)
    ) array (
        .clk(clk), .load(load), .init(init), .start(start), .valid(valid), .a(a), .w(w),
        .merge(merge), .add(add), .result(result), .column_overflows(column_overflows),
        .tree_overflows(tree_overflows), .overflows(overflows)
    );

    task tick;
        begin
            #1 clk = 1;
            #1 clk = 0;
        end
    endtask

    initial begin
        $readmemh("a.hex", a_words);
        $readmemh("w.hex", w_words);
        $readmemh("init.hex", init_words);
        file = $fopen("result.hex", "w");
        for (row = 0; row < ROWS; row = row + 1)
            for (col = 0; col < COLS; col = col + 1) begin
                init = init_words[row*COLS+col];
                all_column_overflows = 0;
                all_tree_overflows = 0;
                load = 1;
                tick;
                load = 0;
                for (tile = 0; tile < TILES; tile = tile + 1) begin
                    start = 1;
                    tick;
                    start = 0;
                    valid = 1;
                    for (chunk = 0; chunk < CHUNKS; chunk = chunk + 1) begin
                        a = a_words[row*WORDS+tile*CHUNKS+chunk];
                        w = w_words[col*WORDS+tile*CHUNKS+chunk];
                        tick;
                    end
                    valid = 0;
                    merge = 1;
                    for (p = 1; p < P; p = p + 1) tick;
                    merge = 0;
                    all_column_overflows = all_column_overflows + column_overflows;
                    all_tree_overflows = all_tree_overflows + tree_overflows;
                    add = 1;
                    tick;
                    add = 0;
                end
                $fwrite(file, "%h %h %h %h\n", result, overflows, all_column_overflows,
                        all_tree_overflows);
            end
        $fclose(file);
        $finish;
    end
endmodule
