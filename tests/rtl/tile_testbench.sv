// Run ROWS rows of CHUNKS chunks through a tile, then drain its columns through each SRS setting.
// Reads a.hex (ROWS * CHUNKS words), w.hex (COLUMNS * CHUNKS words), init.hex (ROWS * COLUMNS) and
// settings.hex; writes result.hex, one line per output: accumulator, then one output per setting.
// Between rows the operands are zero, as in an array that has nothing to do.
`timescale 1ns / 1ps
module tile_testbench #(
    parameter COLUMNS = 1,
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
    parameter MODES = 16'h3f0f,
    parameter ROWS = 1,
    parameter CHUNKS = 1,
    parameter IDLE = 3,
    parameter SETTINGS = 1
);
    localparam DRAIN = (COLUMNS > 1) ? $clog2(COLUMNS) : 1;

    reg clk = 0, load = 0, merge = 0;
    reg [C*AW-1:0] a_words [0:ROWS*CHUNKS-1];
    reg [C*WW-1:0] w_words [0:COLUMNS*CHUNKS-1];
    reg [ACC-1:0] init_words [0:ROWS*COLUMNS-1];
    reg [15:0] settings [0:SETTINGS-1];  // {saturation 2, rounding 4, spare 3, shift 7}
    reg [COLUMNS*ACC-1:0] init;
    reg [C*AW-1:0] a;
    reg [COLUMNS*C*WW-1:0] w;
    reg [DRAIN-1:0] drain;
    reg signed [6:0] shift;
    reg [3:0] rounding;
    reg [1:0] saturation;
    wire signed [ACC-1:0] acc;
    wire [OUT-1:0] out;
    integer row, col, chunk, p, s, file;

    tile #(
        .COLUMNS(COLUMNS), .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED), .C(C),
        .P(P), .ACC(ACC), .OVERFLOW(OVERFLOW), .TREE(TREE), .TREE_OVERFLOW(TREE_OVERFLOW),
        .ZERO_POINT(ZERO_POINT), .OUT(OUT), .OUT_SIGNED(OUT_SIGNED), .MODES(MODES)
    ) array (
        .clk(clk), .load(load), .init(init), .a(a), .w(w), .merge(merge), .drain(drain),
        .shift(shift), .rounding(rounding), .saturation(saturation), .acc(acc), .out(out)
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
        for (row = 0; row < ROWS; row = row + 1) begin
            for (col = 0; col < COLUMNS; col = col + 1)
                init[ACC*col +: ACC] = init_words[row*COLUMNS+col];
            load = 1;
            tick;
            load = 0;
            for (chunk = 0; chunk < CHUNKS; chunk = chunk + 1) begin
                a = a_words[row*CHUNKS+chunk];
                for (col = 0; col < COLUMNS; col = col + 1)
                    w[C*WW*col +: C*WW] = w_words[col*CHUNKS+chunk];
                tick;
            end
            a = 0;
            for (p = 0; p < IDLE; p = p + 1) tick;
            merge = 1;
            for (p = 1; p < P; p = p + 1) tick;
            merge = 0;
            for (p = 0; p < IDLE; p = p + 1) tick;
            for (col = 0; col < COLUMNS; col = col + 1) begin
                drain = col;
                #1 $fwrite(file, "%h", acc);
                for (s = 0; s < SETTINGS; s = s + 1) begin
                    {saturation, rounding} = settings[s][15:10];
                    shift = settings[s][6:0];
                    #1 $fwrite(file, " %h", out);
                end
                $fwrite(file, "\n");
            end
        end
        $fclose(file);
        $finish;
    end
endmodule
