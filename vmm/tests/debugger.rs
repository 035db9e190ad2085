//! A debugger at small guests, through `--gdb`.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

#[path = "rig/gdb.rs"]
mod gdb;
mod rig;

use std::path::Path;

use bedplate_api::vmm::ExitReason;
use gdb::{CR0, CS, GS_BASE, Gdb, RAX, RIP};
use rig::{RESET, Rig, Running, SPIN, eventually, has_kvm, request};

/// Where the code is, guest-virtual and guest-physical.
const CODE: u64 = 0x10_0000;
/// A number in memory that the guests below change.
const NUMBER: u64 = 0x20_0000;
/// `mov eax, 1; inc eax; inc eax`
const COUNT: [u8; 9] = [0xb8, 1, 0, 0, 0, 0xff, 0xc0, 0xff, 0xc0];
/// `inc dword [NUMBER]; jmp back`
const FOREVER: [u8; 9] = [0xff, 0x04, 0x25, 0, 0, 0x20, 0, 0xeb, 0xf7];

/// A guest that waits, and its debugger.
struct Debugged {
    gdb: Gdb,
    process: Running,
    rig: Rig,
}

impl Debugged {
    /// None where there is no KVM.
    fn new(code: &[&[u8]]) -> Option<Self> {
        has_kvm().then(|| Self::with(code, ""))
    }

    fn with(code: &[&[u8]], more: &str) -> Self {
        let rig = Rig::new(code);
        let config = rig.config(more);
        let mut command = rig.command();
        command.arg("--config-file").arg(config).arg("--api-sock").arg(rig.path("api"));
        let process = Running(command.arg("--gdb").arg(rig.path("gdb")).spawn().unwrap());
        let gdb = attach(&rig.path("gdb"));
        Self { gdb, process, rig }
    }

    fn number(&mut self) -> u32 {
        u32::from_le_bytes(self.gdb.read(NUMBER, 4).unwrap().try_into().unwrap())
    }

    fn end(mut self) {
        let _ = request(&self.rig.path("api"), "PUT", "/bedplate/stop", "");
        assert_eq!(self.process.wait(), 0);
        assert!(!self.rig.path("gdb").exists(), "the socket stays behind");
    }
}

fn attach(path: &Path) -> Gdb {
    eventually("the debugger's socket answers", || Gdb::attach(path).ok())
}

#[test]
fn registers_and_memory_are_read_and_written_while_the_guest_waits() {
    let Some(mut guest) = Debugged::new(&[&COUNT, &FOREVER]) else { return };
    let gdb = &mut guest.gdb;
    assert!(gdb.ask("qSupported:multiprocess+;swbreak+;hwbreak+").unwrap().contains("qXfer:features:read+"));
    assert!(gdb.ask("qXfer:features:read:target.xml:0,fff").unwrap().contains("org.gnu.gdb.i386.core"));
    assert!(gdb.ask("?").unwrap().starts_with('T'));
    // Before its first instruction.
    let registers = gdb.registers().unwrap();
    assert_eq!(gdb.register(RIP).unwrap(), CODE);
    assert_eq!(gdb.register(CR0).unwrap() & (1 << 31 | 1), 1 << 31 | 1);
    assert_ne!(registers[CS], 0);
    assert_eq!(gdb.read(CODE, COUNT.len()).unwrap(), COUNT);
    // A step, and another one; nothing else moves.
    assert!(gdb.step(1).unwrap().starts_with("T05"));
    assert_eq!((gdb.register(RIP).unwrap(), gdb.register(RAX).unwrap()), (CODE + 5, 1));
    gdb.set_register(RAX, 0x41).unwrap();
    gdb.set_register(GS_BASE, 0xffff_8000_1234_0000).unwrap();
    assert!(gdb.step(1).unwrap().starts_with("T05"));
    assert_eq!((gdb.register(RIP).unwrap(), gdb.register(RAX).unwrap()), (CODE + 7, 0x42));
    assert_eq!(gdb.register(GS_BASE).unwrap(), 0xffff_8000_1234_0000);
    // What a segment is in protected mode is not said by its number.
    let mut other = gdb.registers().unwrap();
    other[CS] ^= 8;
    let text: String = other.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(gdb.ask(&format!("G{text}")).unwrap(), "E16");
    // Memory across a page's border, and where there is none.
    gdb.write(NUMBER + 0xffe, b"abcd").unwrap();
    assert_eq!(gdb.read(NUMBER + 0xffe, 4).unwrap(), b"abcd");
    assert!(gdb.read(0x7fff_0000_0000, 4).is_err() && gdb.write(u64::MAX - 1, b"abcd").is_err());
    assert!(gdb.read(u64::MAX, 1).is_err());
    guest.end();
}

#[test]
fn breakpoints_by_register_stop_the_guest() {
    let Some(mut guest) = Debugged::new(&[&COUNT, &FOREVER]) else { return };
    let gdb = &mut guest.gdb;
    let loop_at = CODE + COUNT.len() as u64;
    for at in [loop_at, loop_at + 7] {
        gdb.order(&format!("Z1,{at:x},1")).unwrap();
        let why = gdb.go().unwrap();
        assert!(why.starts_with("T05") && why.contains("hwbreak"), "{why}");
        assert_eq!((gdb.register(RIP).unwrap(), gdb.register(RAX).unwrap()), (at, 3));
        gdb.order(&format!("z1,{at:x},1")).unwrap();
    }
    assert_eq!(guest.number(), 1);
    // There are four of them; what does not fit into one is refused.
    let gdb = &mut guest.gdb;
    (0..4).for_each(|at| gdb.order(&format!("Z1,{:x},1", CODE + at)).unwrap());
    assert!(gdb.ask(&format!("Z1,{:x},1", CODE + 4)).unwrap().starts_with('E'));
    (0..4).for_each(|at| gdb.order(&format!("z1,{:x},1", CODE + at)).unwrap());
    assert!(gdb.ask(&format!("Z2,{:x},4", NUMBER + 1)).unwrap().starts_with('E'));
    // Those in memory are not seen there. This machine's KVM may be one that cannot stop at them: the lab's tests do.
    gdb.order(&format!("Z0,{CODE:x},1")).unwrap();
    assert_eq!(gdb.read(CODE, 9).unwrap(), COUNT);
    assert!(gdb.ask("Z0,7fff00000000,1").unwrap().starts_with('E'));
    guest.end();
}

#[test]
fn a_running_guest_is_interrupted_and_goes_on_without_its_debugger() {
    let Some(mut guest) = Debugged::new(&[&COUNT, &FOREVER]) else { return };
    guest.gdb.send("vCont;c").unwrap();
    guest.gdb.interrupt().unwrap();
    assert!(guest.gdb.answer().unwrap().starts_with("T02"));
    let still = guest.number();
    assert_eq!(guest.number(), still);
    // Pausing, resuming and looking from outside do not move what the debugger holds.
    let api = guest.rig.path("api");
    for state in ["Paused", "Resumed"] {
        assert_eq!(request(&api, "PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#)).0, 204);
        let (status, inspection) = request(&api, "GET", "/bedplate/inspect", "");
        assert!(status == 200 && inspection.contains("\"rip\""), "{inspection}");
        assert_eq!(guest.number(), still);
    }
    // It goes away with a breakpoint in the loop: the guest runs on without.
    let loop_at = CODE + COUNT.len() as u64;
    guest.gdb.order(&format!("Z1,{loop_at:x},1")).unwrap();
    eventually("the guest goes on", || {
        guest.gdb = attach(&guest.rig.path("gdb"));
        // Twice more often than a breakpoint would have let it.
        (guest.number() > still + 2).then_some(())
    });
    // A second one waits for its turn.
    let mut second = attach(&guest.rig.path("gdb"));
    second.send("?").unwrap();
    guest.gdb.order("D").unwrap();
    assert!(second.answer().unwrap().starts_with('T'));
    guest.gdb = second;
    guest.end();
}

#[test]
fn the_debugger_sees_the_end_and_can_make_it() {
    let Some(mut guest) = Debugged::new(&[&COUNT, &RESET]) else { return };
    assert!(guest.gdb.go().unwrap().starts_with("W00"));
    assert_eq!(guest.process.wait(), 0);
    assert_eq!(guest.rig.exit().reason, ExitReason::GuestReset);

    let Some(mut guest) = Debugged::new(&[&SPIN]) else { return };
    guest.gdb.send("k").unwrap();
    assert_eq!(guest.process.wait(), 0);
    assert_eq!(guest.rig.exit().detail, "ended by a debugger");
    // What is no request ends the conversation and nothing else.
    let Some(mut guest) = Debugged::new(&[&COUNT, &FOREVER]) else { return };
    guest.gdb.send(&"m".repeat(10_000)).unwrap();
    guest.gdb = attach(&guest.rig.path("gdb"));
    assert!(guest.gdb.ask("?").unwrap().starts_with('T'));
    guest.end();
}

#[test]
fn vcpus_are_threads() {
    if !has_kvm() {
        return;
    }
    let two = r#", "machine-config": {"vcpu_count": 2, "mem_size_mib": 64}"#;
    let mut guest = Debugged::with(&[&COUNT, &FOREVER], two);
    let gdb = &mut guest.gdb;
    assert_eq!(gdb.ask("qfThreadInfo").unwrap().replace("p01.", ""), "m01,02");
    gdb.order("Hgp1.2").unwrap();
    // It waits for the first, where a processor begins.
    assert_eq!(gdb.register(RIP).unwrap(), 0xfff0);
    gdb.order("Hgp1.1").unwrap();
    assert_eq!(gdb.register(RIP).unwrap(), CODE);
    assert!(gdb.step(1).unwrap().starts_with("T05"));
    assert_eq!(gdb.register(RIP).unwrap(), CODE + 5);
    guest.end();
}

#[test]
fn a_socket_that_cannot_be_had_is_named() {
    let rig = Rig::new(&[&SPIN]);
    let said = rig.refusal_with(&["--gdb", "/nowhere/gdb"], "");
    assert!(said.contains("debugger's socket: /nowhere/gdb"), "{said}");
}
