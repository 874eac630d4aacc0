// Run ROWS x COLS dot products of CHUNKS chunks through mac.sv, then every SRS setting on each.
// Reads a.hex (ROWS * CHUNKS words), w.hex, init.hex and settings.hex; writes result.hex, one line
// per output: accumulator, overflows, tree overflows, then one SRS output per setting.
`timescale 1ns / 1ps
module testbench #(
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
    parameter OUT = 8,
    parameter OUT_SIGNED = 1,
    parameter ROWS = 1,
    parameter COLS = 1,
    parameter CHUNKS = 1,
    parameter SETTINGS = 1
);
    reg clk = 0, load = 0, valid = 0, merge = 0;
    reg [C*AW-1:0] a_words [0:ROWS*CHUNKS-1];
    reg [C*WW-1:0] w_words [0:COLS*CHUNKS-1];
    reg [ACC-1:0] init_words [0:ROWS*COLS-1];
    reg [15:0] settings [0:SETTINGS-1];  // {saturation 2, rounding 4, spare 3, shift 7}
    reg [C*AW-1:0] a;
    reg [C*WW-1:0] w;
    reg [ACC-1:0] init;
    reg signed [6:0] shift;
    reg [3:0] rounding;
    reg [1:0] saturation;
    wire signed [ACC-1:0] result;
    wire [31:0] overflows, tree_overflows;
    wire [OUT-1:0] out;
    integer row, col, chunk, p, s, file;

    mac #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED), .C(C), .P(P), .ACC(ACC),
        .OVERFLOW(OVERFLOW), .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW)
    ) column (
        .clk(clk), .load(load), .init(init), .valid(valid), .a(a), .w(w), .merge(merge),
        .result(result), .overflows(overflows), .tree_overflows(tree_overflows)
    );
    srs #(.ACC(ACC), .OUT(OUT), .OUT_SIGNED(OUT_SIGNED)) narrow (
        .acc(result), .shift(shift), .rounding(rounding), .saturation(saturation), .out(out)
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
        $readmemh("settings.hex", settings);
        file = $fopen("result.hex", "w");
        for (row = 0; row < ROWS; row = row + 1)
            for (col = 0; col < COLS; col = col + 1) begin
                init = init_words[row*COLS+col];
                load = 1;
                tick;
                load = 0;
                valid = 1;
                for (chunk = 0; chunk < CHUNKS; chunk = chunk + 1) begin
                    a = a_words[row*CHUNKS+chunk];
                    w = w_words[col*CHUNKS+chunk];
                    tick;
                end
                valid = 0;
                merge = 1;
                for (p = 1; p < P; p = p + 1) tick;
                merge = 0;
                $fwrite(file, "%h %h %h", result, overflows, tree_overflows);
                for (s = 0; s < SETTINGS; s = s + 1) begin
                    {saturation, rounding} = settings[s][15:10];
                    shift = settings[s][6:0];
                    #1 $fwrite(file, " %h", out);
                end
                $fwrite(file, "\n");
            end
        $fclose(file);
        $finish;
    end
endmodule
