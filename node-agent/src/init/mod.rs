//! (placeholder)
/// x
pub fn main() -> ! {
    std::process::exit(1)
}
