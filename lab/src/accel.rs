//! What runs a machine's processors: KVM where it can run a whole node, else emulation.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::{Console, Process};

/// Set to `kvm`, `tcg` or `counted` to choose without a trial.
pub const CHOICE: &str = "BEDPLATE_LAB_ACCEL";

/// How long the firmware may take to say its first word: where KVM cannot run it, that never comes.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// How long it may take from there until it finds that there is nothing to boot: a fraction of a second on real KVM, many
/// seconds where this machine is itself emulated.
const TO_THE_END: Duration = Duration::from_secs(60);

/// What runs a machine's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The host's hardware virtualization, nested: the node's own VMs use it too.
    Kvm,
    /// Emulation of an AMD processor with virtualization of its own. Much slower, everything works.
    Tcg,
    /// Emulation whose clock counts instructions, 2 ns each, and jumps to the next timer when there is nothing to do: the same
    /// work takes the same time, whatever else the host does. For measuring only: guests stand still in it now and then.
    Counted,
}

impl Accel {
    /// The best that works here. Tried once in a process: /dev/kvm alone says little, since it may be unable to nest, or
    /// to run unmodified code at all.
    pub fn best() -> Self {
        static BEST: OnceLock<Accel> = OnceLock::new();
        *BEST.get_or_init(|| match std::env::var(CHOICE).as_deref() {
            Ok("kvm") => Self::Kvm,
            Ok("tcg") => Self::Tcg,
            Ok("counted") => Self::Counted,
            _ if kvm_can_nest() && kvm_runs_firmware() => Self::Kvm,
            _ => Self::Tcg,
        })
    }

    /// QEMU's arguments for it.
    pub(crate) const fn args(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // QEMU emulates AMD's virtualization only, hence an AMD processor; one of those that Firecracker has a name for.
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "EPYC-Milan"],
            Self::Counted => &["-accel", "tcg,thread=single", "-icount", "shift=1,align=off,sleep=off", "-cpu", "EPYC"],
        }
    }

    /// How many processors a machine gets that asks for `asked`.
    ///
    /// One where they are emulated, on a thread of its own. QEMU before 8.1 does not lock a page of code while it translates
    /// it, so that what another processor patches there meanwhile may be missed for good: a kernel that switches a static
    /// branch, as KVM does with each first and last VM, then traps on the same stale breakpoint for ever.
    pub const fn cpus(self, asked: u8) -> u8 {
        match self {
            Self::Kvm => asked,
            Self::Tcg | Self::Counted => 1,
        }
    }

    /// What the kernel of a machine that runs VMs must be told, for its command line.
    ///
    /// Both are ways around faults of QEMU's emulation, told in docs/lab.md. Nested page tables lose a guest now and then:
    /// straight after a `#VMEXIT` the host's own next instruction is looked up through the guest's tables once more. With
    /// shadow page tables that walk does not exist. And an interrupt that comes during a `VMRUN` or a `#VMEXIT` may be
    /// forgotten until the next one comes: with a periodic tick that is soon, without one it may be never.
    pub const fn kernel_words(self) -> &'static str {
        match self {
            Self::Kvm => "",
            Self::Tcg => "kvm_amd.npt=0 nohz=off highres=off",
            // The time-stamp counter is the clock that counts; nothing else is as even.
            Self::Counted => "nohz=off highres=off tsc=reliable",
        }
    }

    /// In words.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Kvm => "KVM, nested",
            Self::Tcg => "emulation (no KVM here that can run a whole node)",
            Self::Counted => "emulation with a clock that counts instructions",
        }
    }
}

fn kvm_can_nest() -> bool {
    ["kvm_amd", "kvm_intel"].iter().any(|module| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    })
}

fn firmware_ends(console: &Console) -> bool {
    console.wait_for("SeaBIOS (version", FIRST_WORD).is_ok()
        && console.wait_for("No bootable device", TO_THE_END).is_ok()
}

/// Starts a machine without disks and sees whether its firmware gets to the point of saying so.
fn kvm_runs_firmware() -> bool {
    let dir = std::env::temp_dir().join(format!("bedplate-kvm-trial-{}", std::process::id()));
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "q35", "-nodefaults", "-display", "none", "-m", "64"]).args(Accel::Kvm.args());
    command.args(["-chardev", "stdio,id=log", "-device", "isa-debugcon,iobase=0x402,chardev=log"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let Ok(mut trial) = Process::start("KVM trial", command) else { return false };
    let Some(output) = trial.take_stdout() else { return false };
    let booted = Console::new("KVM trial", &dir, output, None).is_ok_and(|console| firmware_ends(&console));
    let _ = fs::remove_file(&dir);
    booted
}
