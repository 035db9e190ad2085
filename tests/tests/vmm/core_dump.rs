//! A guest's memory and registers in a file, read back.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

/// What the guest has in its memory, and nobody else: not even the command that puts it there.
const WORDS: &str = "seven-green-bottles";
const PLACE: &str = "/run/dumps";
/// A place with little room.
const FULL: &str = "/run/full";

/// A segment or a note: where it lies in the file, how long it is, and of a segment its guest-physical address.
struct Part {
    kind: u32,
    at: u64,
    len: u64,
    address: u64,
}

struct Core {
    file: File,
    parts: Vec<Part>,
}

impl Core {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let mut core = Self { file, parts: Vec::new() };
        let head = core.read(0, 64)?;
        ensure!(head.starts_with(b"\x7fELF\x02\x01\x01") && head[16] == 4 && head[18] == 62, "no core file: {head:x?}");
        for number in 0..u64::from(head[56]) {
            let header = core.read(u64_of(&head, 32)? + number * 56, 56)?;
            let [at, _, address, len] = [8, 16, 24, 32].map(|field| u64_of(&header, field).unwrap_or_default());
            core.parts.push(Part { kind: header[0].into(), at, len, address });
        }
        Ok(core)
    }

    fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).with_context(|| format!("{len} bytes at {at:#x}"))?;
        Ok(bytes)
    }

    /// Instruction pointer of each vCPU, from its note.
    fn rips(&self) -> Result<Vec<u64>> {
        let notes = self.parts.iter().find(|part| part.kind == 4).context("no notes")?;
        let notes = self.read(notes.at, notes.len as usize)?;
        let (mut at, mut rips) = (0, Vec::new());
        while at < notes.len() {
            let [name, content, kind] =
                [0, 4, 8].map(|field| u64_of(&notes, at + field).unwrap_or_default() as u32 as usize);
            let start = at + 12 + name.next_multiple_of(4);
            if kind == 1 {
                rips.push(u64_of(&notes, start + 112 + 16 * 8)?);
            }
            at = start + content.next_multiple_of(4);
        }
        Ok(rips)
    }

    /// Whether `words` are somewhere in the first segment.
    fn has(&self, words: &str) -> Result<bool> {
        let ram = self.parts.iter().find(|part| part.kind == 1).context("no segment")?;
        ensure!(ram.address == 0 && ram.len == 256 << 20, "RAM is {:#x} bytes at {:#x}", ram.len, ram.address);
        let mut at = 0;
        while at < ram.len {
            let len = (ram.len - at).min(1 << 20) as usize;
            if self.read(ram.at + at, len)?.windows(words.len()).any(|found| found == words.as_bytes()) {
                return Ok(true);
            }
            at += len as u64;
        }
        Ok(false)
    }
}

fn u64_of(bytes: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from_le_bytes(bytes.get(at..at + 8).context("it is too short")?.try_into()?))
}

pub fn is_read_back() -> Result<()> {
    for place in [PLACE, FULL] {
        fs::create_dir_all(place)?;
    }
    mount("tmpfs", FULL, "tmpfs", MountFlags::empty(), Some(c"size=1m")).context("mount a small tmpfs")?;
    let options = ["--visible", PLACE, "--visible", FULL];
    let mut guest = GuestSpec::new("dumped").cpus(2).options(&options).boot()?;
    guest.run(&format!("echo {} | sed s/-x-/-/g > /tmp/words", WORDS.replace('-', "-x-")))?;
    guest.run(&format!("test $(cat /tmp/words) = {}$(echo s)", WORDS.trim_end_matches('s')))?;
    let dump = |path: &str, status| guest.api("PUT", "/bedplate/core-dump", &json!({"path": path}).to_string(), status);
    let path = format!("{PLACE}/guest.core");
    dump(&path, 204)?;
    let core = Core::open(path.as_ref())?;
    let there = fs::metadata(&path)?;
    ensure!(there.mode() & 0o777 == 0o600 && there.len() > 256 << 20, "{there:?}");
    ensure!(there.blocks() * 512 < 200 << 20, "{} KiB: what the guest never touched was written", there.blocks() / 2);
    let rips = core.rips()?;
    ensure!(rips.len() == 2 && rips.iter().all(|rip| *rip != 0), "{rips:x?}");
    ensure!(core.has(WORDS)?, "what the guest has in its memory is not in the dump");
    // It goes on; one that is paused stays so.
    ensure!(guest.run("echo went on")? == "went on");
    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    dump(&path, 204)?;
    ensure!(guest.api("GET", "/", "", 200)?.contains("Paused"));
    let rips = Core::open(path.as_ref())?.rips()?;
    let inspection = guest.api("GET", "/bedplate/inspect", "", 200)?;
    ensure!(rips.iter().all(|rip| inspection.contains(&rip.to_string())), "{rips:?} are not in {inspection}");
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    // Where it cannot be: said with its name, and nothing is left.
    let said = dump(&format!("{FULL}/guest.core"), 400)?;
    ensure!(said.contains("/run/full/guest.core: No space left") && said.contains("make room"), "{said}");
    ensure!(fs::read_dir(FULL)?.count() == 0, "something stays");
    let said = dump("/run/elsewhere/guest.core", 400)?;
    ensure!(said.contains("/run/elsewhere/guest.core") && said.contains("--visible"), "{said}");
    ensure!(guest.run("echo still here")? == "still here");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    fs::remove_dir_all(PLACE)?;
    unmount(FULL, UnmountFlags::empty())?;
    Ok(())
}
