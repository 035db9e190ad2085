//! What a person at the machine's console reads.

use std::fs::OpenOptions;

/// Lets stdin, stdout and stderr be the console. The kernel did that before it started us only if the initramfs holds the
/// device.
pub(super) fn attach() {
    let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") else { return };
    // A failure leaves what the kernel gave us; there is nobody else to tell.
    let _kept = rustix::stdio::dup2_stdin(&console);
    let _kept = rustix::stdio::dup2_stdout(&console);
    let _kept = rustix::stdio::dup2_stderr(&console);
}

/// Says one sentence.
pub(super) fn say(message: &str) {
    use std::io::Write;
    // A console that is gone is no reason for PID 1 to end, which `eprintln!` would be.
    let _gone = writeln!(std::io::stderr(), "node: {message}");
}
