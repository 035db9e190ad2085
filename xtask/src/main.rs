//! Build, check, lab and demo commands.
fn main() {}
