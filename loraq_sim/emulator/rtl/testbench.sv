// @TITLE@
// Feeds a.hex, w.hex and init.hex to module dut and compares it with acc.hex and out.hex, word for word.
// Run beside them:  iverilog -g2012 -o vectors.vvp testbench.sv dut.sv mac.sv srs.sv
//                   vvp -n vectors.vvp
// or (5.006 or newer): verilator --binary --timing -Wno-lint --top-module testbench -o vectors \
//                        testbench.sv dut.sv mac.sv srs.sv
//                      obj_dir/vectors
// Prints PASS or FAIL with counts; the exit status is not zero after FAIL. Put your design in
// place of dut.sv (mac.sv and srs.sv belong to the reference).
`timescale 1ns / 1ps
module testbench;
@PARAMETERS@
    localparam TIMEOUT = 1000;     // cycles to wait for done
    localparam SHOWN = 10;         // mismatches to print

    reg clk = 0, start = 0, valid = 0, last = 0;
    reg [C*AW-1:0] a;
    reg [C*WW-1:0] w;
    reg signed [63:0] init;
    wire done;
    wire [RESULT-1:0] acc;
    wire [OUT-1:0] out;

    reg [AW-1:0] a_codes [0:M*K-1];                 // row-major (M, K)
    reg [WW-1:0] w_codes [0:N*K-1];                 // row-major (N, K)
    reg [63:0] init_words [0:PASSES*M*N-1];         // row-major (PASSES, M, N)
    reg [RESULT-1:0] acc_words [0:PASSES*M*N-1];
    reg [OUT-1:0] out_words [0:PASSES*M*N-1];
    integer pass, row, col, k, i, stop, index, waited;
    integer acc_wrong, out_wrong;

    dut #(
        .AW(AW), .WW(WW), .A_SIGNED(A_SIGNED), .W_SIGNED(W_SIGNED), .AFTER(AFTER),
        .RESULT(RESULT), .C(C), .P(P), .ACC(ACC), .OVERFLOW(OVERFLOW), .TREE(TREE),
        .TREE_OVERFLOW(TREE_OVERFLOW), .OUT(OUT), .SHIFT(SHIFT), .ROUNDING(ROUNDING),
        .SATURATION(SATURATION)
    ) device (
        .clk(clk), .start(start), .init(init), .valid(valid), .last(last), .a(a), .w(w),
        .done(done), .acc(acc), .out(out)
    );

    task tick;
        begin
            #1 clk = 1;
            #1 clk = 0;
        end
    endtask

    initial begin
        $readmemh("a.hex", a_codes);
        $readmemh("w.hex", w_codes);
        $readmemh("init.hex", init_words);
        $readmemh("acc.hex", acc_words);
        $readmemh("out.hex", out_words);
        acc_wrong = 0;
        out_wrong = 0;
        for (pass = 0; pass < PASSES; pass = pass + 1)
            for (row = 0; row < M; row = row + 1)
                for (col = 0; col < N; col = col + 1) begin
                    index = (pass * M + row) * N + col;
                    stop = ((pass + 1) * PASS_K < K) ? (pass + 1) * PASS_K : K;
                    init = init_words[index];
                    start = 1;
                    tick;
                    start = 0;
                    valid = 1;
                    for (k = pass * PASS_K; k < stop; k = k + C) begin
                        a = 0;
                        w = 0;
                        for (i = 0; i < C && k + i < stop; i = i + 1) begin
                            a[AW*i +: AW] = a_codes[row*K+k+i];
                            w[WW*i +: WW] = w_codes[col*K+k+i];
                        end
                        last = (k + C >= stop);
                        tick;
                    end
                    valid = 0;
                    last = 0;
                    for (waited = 0; done !== 1'b1 && waited < TIMEOUT; waited = waited + 1) tick;
                    if (done !== 1'b1)
                        $display("no done within %0d cycles: pass %0d row %0d column %0d",
                                 TIMEOUT, pass, row, col);
                    #1;
                    if (done !== 1'b1 || acc !== acc_words[index]) begin
                        acc_wrong = acc_wrong + 1;
                        if (acc_wrong <= SHOWN)
                            $display("pass %0d row %0d column %0d: acc %h, expected %h",
                                     pass, row, col, acc, acc_words[index]);
                    end
                    if (done !== 1'b1 || out !== out_words[index]) begin
                        out_wrong = out_wrong + 1;
                        if (out_wrong <= SHOWN)
                            $display("pass %0d row %0d column %0d: out %h, expected %h",
                                     pass, row, col, out, out_words[index]);
                    end
                end
        // Not every simulator leaves the block at $finish, so that nothing may follow it.
        if (acc_wrong == 0 && out_wrong == 0) begin
            $display("PASS: %0d accumulators and %0d outputs agree", PASSES * M * N,
                     PASSES * M * N);
            $finish;
        end else begin
            $display("FAIL: %0d of %0d accumulators and %0d of %0d outputs differ", acc_wrong,
                     PASSES * M * N, out_wrong, PASSES * M * N);
            $fatal(1, "the device and the vectors differ");
        end
    end
endmodule
