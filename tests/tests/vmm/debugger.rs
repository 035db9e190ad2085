//! A debugger in the guest: a few instructions, then Debian's kernel.

#[path = "../../../vmm/tests/rig/elf.rs"]
mod elf;
#[path = "../../../vmm/tests/rig/gdb.rs"]
mod gdb;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::{ELF, say};
use bedplate_tests::patience::until;
use gdb::{CR0, CR3, EFLAGS, GS_BASE, Gdb, RIP};
use serde_json::json;

const SOCKET: &str = "/run/gdb.sock";
/// Where the small guest's code is, and a number that it counts.
const CODE: u64 = 0x10_0000;
const NUMBER: u64 = 0x20_0000;

fn attach() -> Result<Gdb> {
    until("the debugger's socket", Duration::from_secs(60), || Ok(Gdb::attach(SOCKET.as_ref()).ok()))
}

/// A guest of a few instructions that waits.
fn small(name: &str, code: &[u8]) -> Result<Guest> {
    let path = format!("/run/{name}");
    fs::write(&path, elf::kernel(&[code]))?;
    let config = json!({"boot-source": {"kernel_image_path": path}}).to_string();
    GuestSpec::new(name).config(&config).options(&["--gdb", SOCKET]).start()
}

/// Whether the node's processor lets KVM have an `int3`: one that QEMU emulates does not, and a guest without a table of
/// interrupts ends.
fn stops_at_breakpoints() -> Result<bool> {
    let mut guest = small("probe", &[0x90, 0xb0, 0xfe, 0xe6, 0x64])?; // nop; then a reset
    let mut gdb = attach().with_context(|| guest.last_words())?;
    gdb.order(&format!("Z0,{CODE:x},1"))?;
    let why = gdb.go()?;
    if why.starts_with('W') {
        guest.ended()?;
        return Ok(false);
    }
    ensure!(why.contains("swbreak"), "{why}");
    Ok(true)
}

/// Breakpoints in memory, by register and at data; and the guest's own, which is the guest's.
pub fn breakpoints() -> Result<()> {
    /// Where its table of interrupts, the loop, and the handler of `int3` are.
    const IDT: usize = 0x100;
    const LOOP: usize = 9;
    const HANDLER: usize = 0x40;
    let mut code = vec![0x90; 0x200];
    let mut put = |at: usize, bytes: &[u8]| code[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x0f, 0x01, 0x1c, 0x25, 0xf0, 0x00, 0x10, 0x00]); // lidt [0x1000f0]
    put(8, &[0xcc]); // int3
    put(LOOP, &[0xff, 0x04, 0x25, 0, 0, 0x20, 0, 0xeb, 0xf7]); // inc dword [NUMBER]; jmp back
    put(HANDLER, &[0xc7, 0x04, 0x25, 0, 0, 0x20, 0, 0x77, 0, 0, 0, 0x48, 0xcf]); // mov dword [NUMBER], 0x77; iretq
    put(0xf0, &[0xff, 0x0f, 0x00, 0x01, 0x10, 0, 0, 0, 0, 0]);
    put(IDT + 3 * 16, &[HANDLER as u8, 0, 0x10, 0, 0, 0x8e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    if !stops_at_breakpoints()? {
        say("breakpoints are not checked: this node's processor gives int3 to a VM, whoever wants it");
        return Ok(());
    }
    let mut guest = small("breakpoints", &code)?;
    let number = |gdb: &mut Gdb| anyhow::Ok(u32::from_le_bytes(gdb.read(NUMBER, 4)?.try_into().unwrap_or_default()));
    let mut gdb = attach().with_context(|| guest.last_words())?;
    let at = CODE + LOOP as u64;
    gdb.order(&format!("Z0,{at:x},1"))?;
    let why = gdb.go()?;
    ensure!(why.contains("swbreak") && gdb.register(RIP)? == at, "{why}, at {:#x}", gdb.register(RIP)?);
    ensure!(number(&mut gdb)? == 0x77, "its own int3 did not come to its handler once: {:#x}", number(&mut gdb)?);
    ensure!(gdb.read(at, 2)? == [0xff, 0x04], "a breakpoint is seen in memory");
    // As a debugger steps over its own.
    gdb.order(&format!("z0,{at:x},1"))?;
    ensure!(gdb.step(1)?.starts_with("T05") && gdb.register(RIP)? == at + 7);
    gdb.order(&format!("Z0,{at:x},1"))?;
    ensure!(gdb.go()?.contains("swbreak") && number(&mut gdb)? == 0x78);
    gdb.order(&format!("z0,{at:x},1"))?;
    gdb.order(&format!("Z1,{:x},1", at + 7))?;
    ensure!(gdb.go()?.contains("hwbreak") && number(&mut gdb)? == 0x79);
    gdb.order(&format!("z1,{:x},1", at + 7))?;
    gdb.order(&format!("Z2,{NUMBER:x},4"))?;
    let why = gdb.go()?;
    ensure!(why.contains("watch:") && number(&mut gdb)? == 0x7a, "{why}");
    gdb.order(&format!("Z0,{at:x},1"))?;
    let before = number(&mut gdb)?;
    // It leaves with a breakpoint in the loop, and the guest goes on.
    drop(gdb);
    until("the guest to go on", Duration::from_secs(60), || {
        let mut gdb = attach()?;
        Ok((number(&mut gdb)? > before + 1).then_some(()))
    })?;
    // A triple fault is told to the debugger, too: no table of interrupts, and a breakpoint of its own.
    let mut gdb = attach()?;
    gdb.write(0x10_00f0, &[0; 10])?;
    gdb.set_register(RIP, CODE)?;
    let why = gdb.go()?;
    ensure!(why.starts_with('W'), "{why}");
    guest.ended()?;
    Ok(())
}

/// Waits at the kernel's first instruction, goes on from there by steps and then by itself to its init; and is looked into
/// there. Without breakpoints, so that an emulated node's processor can do all of it.
pub fn kernel() -> Result<()> {
    let elf = fs::read(ELF)?;
    let entry = u64::from_le_bytes(elf.get(24..32).and_then(|bytes| bytes.try_into().ok()).context("no entry")?);
    let guest =
        GuestSpec::new("debugged").kernel(ELF).cpus(2).cmdline("nokaslr").options(&["--gdb", SOCKET]).start()?;
    let mut gdb = attach().with_context(|| guest.last_words())?;
    gdb.ask("qSupported:multiprocess+;swbreak+;hwbreak+")?;
    ensure!(gdb.ask("?")?.starts_with('T'));
    let said = fs::read_to_string(guest.file("stderr"))?;
    ensure!(said.contains("waits for a debugger") && said.contains(SOCKET), "{said}");
    // The first instruction, and the next ones.
    let first = gdb.register(RIP)?;
    ensure!(first == entry || Some(first) == pvh_entry(&elf), "begins at {first:#x}, not {entry:#x}");
    ensure!(gdb.read(first, 16)?.iter().any(|byte| *byte != 0), "no code at {first:#x}");
    // One that is repeated is a step each time.
    for _ in 0..20 {
        ensure!(gdb.step(1)?.starts_with("T05"));
    }
    ensure!(gdb.register(RIP)? != first, "no step from {first:#x}");
    ensure!(guest.console().text().is_empty(), "it did not wait");
    gdb.order("D")?;
    guest.ready()?;
    ensure!(guest.run("nproc")? == "2");
    let line = guest.run("grep ' linux_banner$' /proc/kallsyms")?;
    let banner = u64::from_str_radix(line.split(' ').next().unwrap_or_default(), 16).context(line)?;
    // And again, while it runs: it stands still until it is let go.
    let mut gdb = attach()?;
    gdb.ask("qSupported:multiprocess+;swbreak+;hwbreak+")?;
    ensure!(gdb.ask("?")?.starts_with('T'));
    ensure!(gdb.read(banner, 13)? == b"Linux version", "no Linux at {banner:#x}");
    ensure!(gdb.read(banner & !0xfff | 0xffc, 8)?.len() == 8, "across pages");
    guest.begin("echo stood still")?;
    ensure!(gdb.read(banner, 13)? == b"Linux version");
    gdb.send("vCont;c")?;
    let (printed, _) = guest.finish()?;
    ensure!(printed == "stood still", "{printed}");
    gdb.interrupt()?;
    let why = gdb.answer()?;
    ensure!(why.starts_with("T02"), "{why}");
    for thread in 1..=2 {
        gdb.order(&format!("Hgp1.{thread}"))?;
        let registers = gdb.registers()?;
        ensure!(gdb.register(CR0)? >> 31 & 1 == 1 && gdb.register(CR3)? != 0 && registers[EFLAGS] & 2 == 2);
        // Both sleep in the kernel.
        ensure!(gdb.register(RIP)? >> 63 == 1, "vCPU {thread} at {:#x}", gdb.register(RIP)?);
        ensure!(gdb.register(GS_BASE)? >> 63 == 1, "per-CPU data at {:#x}", gdb.register(GS_BASE)?);
    }
    for _ in 0..20 {
        ensure!(gdb.step(1)?.starts_with("T05"));
    }
    drop(gdb);
    ensure!(guest.run("echo goes on")? == "goes on");
    Ok(())
}

/// What the note of a kernel for PVH says.
fn pvh_entry(elf: &[u8]) -> Option<u64> {
    let mark = elf.windows(16).position(|w| w == [4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    let mark =
        mark.or_else(|| elf.windows(16).position(|w| w == [4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]))?;
    elf.get(mark + 16..mark + 20)?.try_into().ok().map(u32::from_le_bytes).map(u64::from)
}
