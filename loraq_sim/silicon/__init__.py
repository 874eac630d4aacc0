"""What the emulated arrays cost in gates: synthesis of their RTL, and energy of real operands."""
