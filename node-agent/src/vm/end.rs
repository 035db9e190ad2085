//! How a VM ended, read from what its process left behind.

use std::io::{Read, Seek, SeekFrom};

use bedplate_api::vmm::{Exit, ExitReason};

use super::cgroup::Cgroup;
use super::dir::VmDir;
use super::outcome::Outcome;
use crate::agent::model::End;
use crate::files;

/// Bytes at the end of stderr in which the last line is looked for.
const STDERR_TAIL: u64 = 4096;
/// Most characters of it, and of a VMM's own reason.
const LONGEST_DETAIL: usize = 500;

/// How the process of the VM in `dir` ended: in its own words where it left any, else as `outcome` and the kernel tell.
pub fn read(dir: &VmDir, outcome: Option<Outcome>, cgroup: Option<&Cgroup>) -> End {
    if let Ok(Some(exit)) = files::read_json::<Exit>(&dir.exit()) {
        return End { reason: exit.reason, detail: in_words(&exit) };
    }
    let mut detail = match outcome {
        _ if cgroup.is_some_and(Cgroup::ran_out_of_memory) => {
            "the VMM was killed because the VM used more memory than its limit".to_owned()
        }
        Some(outcome) => without_a_word(outcome),
        None => {
            "the VMM ended and left no reason; how is not known, because an earlier agent had started it".to_owned()
        }
    };
    if let Some(line) = last_line(dir) {
        detail.push_str(": ");
        detail.push_str(&line);
    }
    End { reason: ExitReason::HostFault, detail }
}

/// An exit, for a person: in the VMM's own words where it has any.
pub fn in_words(exit: &Exit) -> String {
    let class = match exit.reason {
        ExitReason::GuestPowerOff => "the guest powered off",
        ExitReason::GuestReset => "the guest reset itself",
        ExitReason::Stopped => "stopped from outside",
        ExitReason::GuestFault => "the guest failed",
        ExitReason::HostFault => "the VMM failed",
    };
    if exit.detail.is_empty() { class.to_owned() } else { printable(&exit.detail) }
}

/// What a VMM said, which may have been taken over: it goes into reports and onto terminals.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST_DETAIL).collect()
}

/// The end of a VMM that wrote no reason, for a person.
pub fn without_a_word(outcome: Outcome) -> String {
    match outcome {
        Outcome::Signal(_) => format!("the VMM was killed {outcome}"),
        Outcome::Code(_) => format!("the VMM ended {outcome} and left no reason"),
    }
}

/// The last line that is not empty of what the VMM said.
fn last_line(dir: &VmDir) -> Option<String> {
    let mut file = files::open_plain(&dir.stderr()).ok()?;
    let len = file.metadata().ok()?.len();
    // The VMM can make it as long as it likes.
    file.seek(SeekFrom::Start(len.saturating_sub(STDERR_TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(STDERR_TAIL).read_to_end(&mut bytes).ok()?;
    let tail = String::from_utf8_lossy(&bytes);
    tail.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(printable)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bedplate_api::VmId;

    use super::*;

    #[test]
    fn the_vmms_own_word_counts_then_its_status_and_stderr() {
        let state = tempfile::tempdir().unwrap();
        let dir = VmDir::new(state.path(), VmId::random());
        fs::create_dir_all(dir.vmm()).unwrap();
        let unknown = read(&dir, None, None);
        assert_eq!(unknown.reason, ExitReason::HostFault);
        fs::write(dir.stderr(), "starting\ncannot open /dev/kvm: permission denied\n\n").unwrap();
        let detail = read(&dir, None, None).detail;
        assert!(detail.contains("left no reason") && detail.ends_with(": cannot open /dev/kvm: permission denied"));
        let exit = Exit { reason: ExitReason::GuestPowerOff, detail: String::new() };
        files::write_json(&dir.exit(), &exit).unwrap();
        let end = read(&dir, None, None);
        assert_eq!((end.reason, end.detail.as_str()), (ExitReason::GuestPowerOff, "the guest powered off"));
        let exit = Exit { reason: ExitReason::GuestFault, detail: "\x1b[2J".repeat(1 << 18) };
        files::write_json(&dir.exit(), &exit).unwrap();
        let end = read(&dir, None, None);
        assert!(end.detail.len() == LONGEST_DETAIL && end.detail.starts_with("[2J["), "{}", end.detail);
    }
}
