//! How much memory the command takes: a bound, whatever it is given.

// Helpers of tests are tests: a panic there is the failure report.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Runs `command`, the only one that this program runs, to its end, which has to be a good one. The most memory that it had at
/// a time, in bytes.
fn peak_memory(command: &mut Command) -> u64 {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?} failed");
    // SAFETY: all zeros is a value of this structure of numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // Asked of the kernel at the end, because who looks at `VmHWM` from time to time misses the last moments.
    // SAFETY: the pointer is of a live value of the right type, which alone is written.
    let got = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    assert_eq!(got, 0, "{}", std::io::Error::last_os_error());
    u64::try_from(usage.ru_maxrss).unwrap() << 10
}

/// 256 MiB, of which nothing compresses and no two chunks are the same, in 1024 places of a disk of `size` bytes.
fn scattered(file: &File, size: u64) {
    file.set_len(size).unwrap();
    let mut state = 1_u64;
    let mut piece = vec![0; 256 << 10];
    for place in 0..1024 {
        for word in piece.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
        }
        // Not on a chunk's border.
        file.write_all_at(&piece, place * (size / 1024) + 4096).unwrap();
    }
}

#[test]
fn a_sparse_disk_of_100_gib_is_imported_in_less_than_200_mib() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    scattered(&File::create(&raw).unwrap(), 100 * GIB);
    let mut import = Command::new(env!("CARGO_BIN_EXE_bedplate"));
    import.args(["image", "import"]).arg(&raw).args(["--name", "large"]);
    import.env("BEDPLATE_STORE", dir.path().join("store")).env_remove("BEDPLATE_CONTROL");
    let peak = peak_memory(&mut import) / MIB;
    println!("the import of a disk of 100 GiB with 256 MiB of content took {peak} MiB of memory");
    assert!(peak < 200, "{peak} MiB");
}
