//! A guest of a hundred bytes: can KVM here run what every kernel runs?
//!
//! A KVM that emulates privileged code in software may open, answer and run simple guests, and still fail at the first
//! instruction of a real kernel that its emulator lacks. So the probe is a kernel of our own, an ELF file entered in 64-bit
//! mode, which tries such instructions one after the other, writes a letter to the serial port after each, and ends with a
//! reset. The last letter names the instruction that failed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bedplate_api::vmm::{BootSource, ExitReason, MachineConfig, VmConfig};

use crate::vmm::{Vmm, VmmError, Walls};

/// A machine on which this takes a second has other problems; on good ones it takes milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);

/// Where the guest lies: that of a Linux kernel.
const BASE: u64 = 0x100_0000;
const HEADERS_LEN: u64 = 64 + 56;
/// Room of its own for the guest's data, aligned as `xsave` wants.
const DATA: u32 = 0x100_1000;
const STACK: u32 = 0x100_4000;
const SEGMENT_MEMORY: u64 = 0x4000;

/// What was tried, in order; after each the guest writes its letter.
const STEPS: [(u8, &str); 6] = [
    (b'A', "64-bit code and the serial port"),
    (b'B', "fxsave64 and fxrstor64"),
    (b'C', "cmpxchg16b"),
    (b'D', "xsave64 and xrstor64"),
    (b'E', "a reload of the page tables"),
    (b'F', "wrmsr"),
];

/// What the trial showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// An unmodified kernel will run.
    Works,
    /// It did not get through; in words, with what it stopped at.
    Fails(String),
}

/// Runs the guest with the VMM `program`; `dir` is for its files and stays behind.
///
/// # Errors
/// The VMM cannot be started at all.
pub fn run(program: &Path, dir: &Path, walls: Walls) -> Result<Trial, VmmError> {
    let kernel = dir.join("probe.elf");
    let serial = dir.join("serial.log");
    fs::write(&kernel, elf()).map_err(|source| VmmError::File { what: "write", path: kernel.clone(), source })?;
    let config = VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: Some(kernel.to_string_lossy().into_owned()),
            boot_args: Some(String::new()),
            ..BootSource::default()
        }),
        machine_config: MachineConfig { vcpu_count: 1, mem_size_mib: 64, ..MachineConfig::default() },
        ..VmConfig::default()
    };
    let result = Vmm::start(program, dir, "probe", &config, "file:serial.log", walls)?.finish(DEADLINE);
    let letters = fs::read(&serial).unwrap_or_default();
    Ok(match result {
        Ok(exit) if exit.reason == ExitReason::GuestReset && letters.last() == Some(&STEPS[STEPS.len() - 1].0) => {
            Trial::Works
        }
        Ok(exit) => Trial::Fails(format!("a test guest stopped at {}: {}", stopped_at(&letters), brief(&exit.detail))),
        // The VM was never there: the VMM says why, and says it better.
        Err(VmmError::Failed(words)) if letters.is_empty() => Trial::Fails(words),
        Err(error) => {
            Trial::Fails(format!("a test guest stopped at {}: {}", stopped_at(&letters), brief(&error.to_string())))
        }
    })
}

/// The first part of what a VMM says: registers follow.
fn brief(detail: &str) -> &str {
    detail.split_once(", ").map_or(detail, |(first, _)| first)
}

fn stopped_at(letters: &[u8]) -> &'static str {
    let done = STEPS.iter().take_while(|(letter, _)| letters.contains(letter)).count();
    STEPS.get(done).map_or("its end", |(_, what)| what)
}

/// The guest as an ELF file without a PVH note, so that it is entered by the 64-bit boot protocol.
fn elf() -> Vec<u8> {
    let code = code();
    let file_len = HEADERS_LEN + code.len() as u64;
    let mut out = Vec::with_capacity(file_len as usize);
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let half = |out: &mut Vec<u8>, n: u16| out.extend_from_slice(&n.to_le_bytes());
    let word = |out: &mut Vec<u8>, n: u32| out.extend_from_slice(&n.to_le_bytes());
    let long = |out: &mut Vec<u8>, n: u64| out.extend_from_slice(&n.to_le_bytes());
    half(&mut out, 2); // an executable
    half(&mut out, 62); // x86-64
    word(&mut out, 1);
    long(&mut out, BASE + HEADERS_LEN); // entry
    long(&mut out, 64); // program headers follow this one
    long(&mut out, 0); // no sections
    word(&mut out, 0);
    for n in [64, 56, 1, 0, 0, 0] {
        half(&mut out, n); // sizes and counts of headers
    }
    word(&mut out, 1); // a segment to load
    word(&mut out, 7); // to read, write and execute
    for n in [0, BASE, BASE, file_len, SEGMENT_MEMORY, 0x1000] {
        long(&mut out, n); // file offset, virtual and physical address, lengths, alignment
    }
    out.extend_from_slice(&code);
    out
}

fn code() -> Vec<u8> {
    let mut code = Vec::new();
    let say = |code: &mut Vec<u8>, letter: u8| {
        code.extend_from_slice(&[0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
        code.extend_from_slice(&[0xb0, letter, 0xee]); // mov al, letter; out dx, al
    };
    // An instruction whose operand is [DATA + offset]: SIB without base or index.
    let on_data = |code: &mut Vec<u8>, opcode: &[u8], offset: u32| {
        code.extend_from_slice(opcode);
        code.push(0x25);
        code.extend_from_slice(&(DATA + offset).to_le_bytes());
    };
    code.extend_from_slice(&[0x48, 0xc7, 0xc4]); // mov rsp, STACK
    code.extend_from_slice(&STACK.to_le_bytes());
    say(&mut code, b'A');
    code.extend_from_slice(&[0x0f, 0x20, 0xc0, 0x48, 0x83, 0xe0, 0xf3]); // mov rax, cr0; and rax, ~(EM | TS)
    code.extend_from_slice(&[0x48, 0x83, 0xc8, 0x02, 0x0f, 0x22, 0xc0]); // or rax, MP; mov cr0, rax
    code.extend_from_slice(&[0x0f, 0x20, 0xe0, 0x48, 0x0d, 0x00, 0x06, 0, 0]); // mov rax, cr4; or rax, OSFXSR | OSXMMEXCPT
    code.extend_from_slice(&[0x0f, 0x22, 0xe0]); // mov cr4, rax
    on_data(&mut code, &[0x48, 0x0f, 0xae, 0x04], 0); // fxsave64
    on_data(&mut code, &[0x48, 0x0f, 0xae, 0x0c], 0); // fxrstor64
    say(&mut code, b'B');
    code.extend_from_slice(&[0x31, 0xc0, 0x31, 0xd2, 0x31, 0xc9, 0xbb, 1, 0, 0, 0]); // rdx:rax = 0, rcx:rbx = 1
    on_data(&mut code, &[0xf0, 0x48, 0x0f, 0xc7, 0x0c], 0x400); // lock cmpxchg16b
    say(&mut code, b'C');
    code.extend_from_slice(&[0xb8, 1, 0, 0, 0, 0x0f, 0xa2]); // mov eax, 1; cpuid
    code.extend_from_slice(&[0x0f, 0xba, 0xe1, 26, 0x73]); // bt ecx, XSAVE; jnc over what needs it
    let jump = code.len();
    code.push(0);
    code.extend_from_slice(&[0x0f, 0x20, 0xe0, 0x48, 0x0d, 0, 0, 4, 0, 0x0f, 0x22, 0xe0]); // cr4 |= OSXSAVE
    let x87_and_sse = [0xb8, 3, 0, 0, 0, 0x31, 0xd2]; // mov eax, 3; xor edx, edx
    code.extend_from_slice(&[0x31, 0xc9]); // xor ecx, ecx
    code.extend_from_slice(&x87_and_sse);
    code.extend_from_slice(&[0x0f, 0x01, 0xd1]); // xsetbv
    on_data(&mut code, &[0x48, 0x0f, 0xae, 0x24], 0x1000); // xsave64
    on_data(&mut code, &[0x48, 0x0f, 0xae, 0x2c], 0x1000); // xrstor64
    // The distance is some forty bytes by construction.
    code[jump] = u8::try_from(code.len() - jump - 1).unwrap_or(0);
    say(&mut code, b'D');
    code.extend_from_slice(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]); // mov rax, cr3; mov cr3, rax
    say(&mut code, b'E');
    code.extend_from_slice(&[0xb9, 0x01, 0x01, 0, 0xc0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30]); // wrmsr GS_BASE, 0
    say(&mut code, b'F');
    code.extend_from_slice(&[0xb0, 0xfe, 0xe6, 0x64]); // mov al, 0xfe; out 0x64, al: reset
    code.extend_from_slice(&[0xf4, 0xeb, 0xfd]); // hlt, for ever
    code
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// binutils is the judge of the encoding.
    #[test]
    fn a_disassembler_reads_what_was_meant() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("probe");
        fs::write(&path, code()).unwrap();
        let out = Command::new("objdump").args(["-b", "binary", "-m", "i386:x86-64", "-D"]).arg(&path).output();
        let Ok(out) = out else { return eprintln!("skipped: needs objdump (binutils)") };
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        for wanted in [
            "mov    $0x1004000,%rsp",
            "mov    $0x3f8,%dx",
            "fxsave64 0x1001000",
            "fxrstor64 0x1001000",
            "lock cmpxchg16b 0x1001400",
            "cpuid",
            "bt     $0x1a,%ecx",
            "xsetbv",
            "xsave64 0x1002000",
            "xrstor64 0x1002000",
            "mov    %rax,%cr3",
            "wrmsr",
            "out    %al,$0x64",
            "hlt",
        ] {
            assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
        }
        assert!(!text.contains("(bad)"), "{text}");
        let letters: Vec<u8> = STEPS.iter().map(|(letter, _)| *letter).collect();
        assert_eq!(text.matches("(%dx)").count(), letters.len());
    }

    #[test]
    fn the_file_is_a_well_formed_program() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("probe.elf");
        fs::write(&path, elf()).unwrap();
        let Ok(out) = Command::new("readelf").args(["-hl"]).arg(&path).output() else {
            return eprintln!("skipped: needs readelf (binutils)");
        };
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success() && out.stderr.is_empty(), "{text}");
        assert!(text.contains("0x1000078") && text.contains("LOAD"), "{text}");
    }

    #[test]
    fn the_last_letter_names_the_next_step() {
        assert_eq!(stopped_at(b""), STEPS[0].1);
        assert_eq!(stopped_at(b"A"), "fxsave64 and fxrstor64");
        assert_eq!(stopped_at(b"ABCDEF"), "its end");
    }
}
