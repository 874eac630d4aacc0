// Run VECTORS upshifts, shift-round-saturates and multiplier requantizations.
// Reads one hex file per field; writes result.hex, one line per vector: ups in modes 0, 1, 2, then
// srs, then the multiplier with two roundings and with one.
`timescale 1ns / 1ps
module requantize_testbench #(
    parameter IN = 8,
    parameter IN_SIGNED = 1,
    parameter UPS_ACC = 32,
    parameter OUT = 8,
    parameter OUT_SIGNED = 1,
    parameter VECTORS = 1
);
    reg [IN-1:0] xs [0:VECTORS-1];
    reg [5:0] up_shifts [0:VECTORS-1];
    reg [63:0] wides [0:VECTORS-1];
    reg [15:0] settings [0:VECTORS-1];  // {saturation 2, rounding 4, spare 3, shift 7}
    reg [31:0] accs [0:VECTORS-1];
    reg [31:0] factors [0:VECTORS-1];
    reg [6:0] exponents [0:VECTORS-1];
    reg [5:0] shifts [0:VECTORS-1];
    reg [OUT-1:0] zero_points [0:VECTORS-1];

    reg [IN-1:0] x;
    reg [5:0] up_shift, shift;
    reg [1:0] mode, saturation;
    reg signed [63:0] wide;
    reg signed [6:0] srs_shift, exponent;
    reg [3:0] rounding;
    reg signed [31:0] acc, factor;
    reg [OUT-1:0] zero_point;
    wire [UPS_ACC-1:0] raised;
    wire [OUT-1:0] narrow, twice, once;
    integer i, m, file;

    ups #(.IN(IN), .IN_SIGNED(IN_SIGNED), .ACC(UPS_ACC)) up (
        .x(x), .shift(up_shift), .mode(mode), .acc(raised)
    );
    srs #(.ACC(64), .OUT(OUT), .OUT_SIGNED(OUT_SIGNED)) down (
        .acc(wide), .shift(srs_shift), .rounding(rounding), .saturation(saturation), .out(narrow)
    );
    multiplier #(.OUT(OUT), .OUT_SIGNED(OUT_SIGNED)) scale (
        .acc(acc), .factor(factor), .exponent(exponent), .shift(shift), .zero_point(zero_point),
        .twice(twice), .once(once)
    );

    initial begin
        $readmemh("x.hex", xs);
        $readmemh("up_shift.hex", up_shifts);
        $readmemh("wide.hex", wides);
        $readmemh("settings.hex", settings);
        $readmemh("acc.hex", accs);
        $readmemh("factor.hex", factors);
        $readmemh("exponent.hex", exponents);
        $readmemh("shift.hex", shifts);
        $readmemh("zero_point.hex", zero_points);
        file = $fopen("result.hex", "w");
        for (i = 0; i < VECTORS; i = i + 1) begin
            x = xs[i];
            up_shift = up_shifts[i];
            wide = wides[i];
            {saturation, rounding} = settings[i][15:10];
            srs_shift = settings[i][6:0];
            acc = accs[i];
            factor = factors[i];
            exponent = exponents[i];
            shift = shifts[i];
            zero_point = zero_points[i];
            for (m = 0; m < 3; m = m + 1) begin
                mode = m;
                #1 $fwrite(file, "%h ", raised);
            end
            $fwrite(file, "%h %h %h\n", narrow, twice, once);
        end
        $fclose(file);
        $finish;
    end
endmodule
