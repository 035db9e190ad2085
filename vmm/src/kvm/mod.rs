//! The one place that names `kvm-ioctls`: everything above sees [`Vm`], [`Vcpu`] and [`Exit`].
//!
//! Unsafe code stands here because KVM is reached through shared mappings: guest RAM that KVM is told the address of
//! ([`Vm::add_memory`]), each vCPU's run page (`run_page`), and a call that `kvm-ioctls` lacks (`msrs`).

mod baseline;
mod cpuid;
mod creation;
mod debug;
mod exit;
mod irq;
mod msrs;
mod registers;
mod run_page;
mod state;
mod template;
mod vcpu;
mod vm;

pub use cpuid::Topology;
pub use creation::{Created, Creation};
pub use debug::{Debug, DebugExit, HARDWARE_BREAKPOINTS, HardwareBreakpoint, On, Trap};
pub use exit::Exit;
pub use irq::{INTX_PINS, Interrupts, intx_pins};
pub use state::VcpuState;
pub use template::changes;
pub use vcpu::{Kicker, Vcpu, install_kick_signal};
pub use vm::{Vm, VmConfig};

use bedplate_api::vmm::{Capability, CpuBaseline, CpuTemplate};
use kvm_bindings::{KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_X86_MSR_FILTER, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

/// The only version of the KVM API that ever was stable.
const API_VERSION: i32 = 12;

/// What a VM here cannot do without.
const REQUIRED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "in-kernel interrupt controller"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::UserMemory, "user memory"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::IrqRouting, "interrupt routing"),
];

/// Why KVM could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` is not there.
    #[error(
        "/dev/kvm does not exist: turn on hardware virtualization in the firmware and load the module kvm_intel or \
         kvm_amd"
    )]
    Absent,
    /// `/dev/kvm` may not be opened.
    #[error("/dev/kvm cannot be opened: permission denied; run as root or join the group that owns it (usually kvm)")]
    Permission,
    /// `KVM_RUN` has come back with nothing done.
    #[error(
        "KVM cannot get a thread of its own for this VM: permit more processes (`ulimit -u`, `pids.max` of its cgroup)"
    )]
    NoThread,
    /// There is no thread that could wait for it.
    #[error("cannot start a thread: {0}; permit more processes (`ulimit -u`, `pids.max` of the cgroup)")]
    Thread(std::io::Error),
    /// `/dev/kvm` does not open for another reason.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(std::io::Error),
    /// Not the API that we speak.
    #[error("/dev/kvm speaks version {0} of the KVM API, {API_VERSION} is needed: use another kernel")]
    Version(i32),
    /// A feature is missing.
    #[error("this host's KVM lacks the feature \"{0}\": use a newer kernel, or one with it configured in")]
    Missing(&'static str),
    /// More vCPUs than KVM takes.
    #[error("{asked} vCPUs are more than this host's KVM can give one VM ({limit}): ask for fewer")]
    TooManyVcpus {
        /// How many.
        asked: usize,
        /// KVM's limit.
        limit: usize,
    },
    /// A template asks for a capability.
    #[error("cpu-config: this host's KVM lacks capability {0}: take it out of kvm_capabilities, or use a newer kernel")]
    NoCapability(u32),
    /// This host has not all of a baseline.
    #[error("cpu_baseline {baseline}: this host lacks {missing}; {}", advice(.best))]
    Baseline {
        /// As asked for.
        baseline: CpuBaseline,
        /// In words.
        missing: String,
        /// The largest one that it has.
        best: Option<CpuBaseline>,
    },
    /// A template that has a name is for other processors.
    #[error(
        "cpu_template {template:?} is for {models}, and this host is none of them: leave it out, give cpu_baseline x86-64-v2, x86-64-v3 or \
         x86-64-v4 in its place, or use another host"
    )]
    Template {
        /// As asked for.
        template: CpuTemplate,
        /// Names of those that it is for.
        models: String,
    },
    /// A template changes a leaf that is not there.
    #[error(
        "cpu-config: this host's CPUID has no leaf {leaf:#x}, subleaf {subleaf:#x}: take it out of cpuid_modifiers, or leave \
         cpu_template out"
    )]
    NoLeaf {
        /// `eax`.
        leaf: u32,
        /// `ecx`.
        subleaf: u32,
    },
    /// A template changes a register that is not there.
    #[error(
        "cpu-config: this host's KVM does not offer the register {0:#x}: take it out of msr_modifiers, or leave cpu_template out"
    )]
    NoMsr(u32),
    /// A template gives a register what it cannot hold.
    #[error("cpu-config: this host's KVM refuses {value:#x} for the register {addr:#x}: change its bitmap")]
    MsrValue {
        /// Which one.
        addr: u32,
        /// With the changes.
        value: u64,
    },
    /// A call failed.
    #[error("KVM refused to {what}: {source}")]
    Call {
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The guest touched an address of its memory that cannot be had.
    #[error("the host has nothing behind an address of the guest's memory")]
    Unbacked,
    /// All interrupt routes are in use.
    #[error("all {0} interrupt routes are in use: give the VM fewer devices")]
    NoGsi(u32),
}

/// Turns the errno of a failed call into an error that says what was asked.
fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call { what, source: std::io::Error::from_raw_os_error(error.errno()) }
}

fn advice(best: &Option<CpuBaseline>) -> String {
    match best {
        Some(best) => format!("give {best}, the best that it has, or use another host"),
        None => "it has none of them: leave cpu_baseline out, or use another host".into(),
    }
}

/// What of KVM a baseline needs, by number and name: both are of Linux 5.10.
const NEEDED_BY_BASELINES: [(u32, &str); 2] = [
    (KVM_CAP_X86_MSR_FILTER, "KVM's filter of model-specific registers"),
    (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "KVM's refusal of its own features that are hidden"),
];

/// What KVM lacks for any baseline.
fn missing_for_baselines(kvm: &Kvm) -> Vec<String> {
    let lacks = |(number, name): &(u32, &str)| {
        let is_there = kvm.check_extension_raw((*number).into()) > 0;
        (!is_there).then(|| (*name).to_owned())
    };
    NEEDED_BY_BASELINES.iter().filter_map(lacks).collect()
}

/// Each baseline, and what this host lacks of it.
///
/// # Errors
/// There is no KVM, or it lacks what any VM needs.
pub fn baselines() -> Result<Vec<(CpuBaseline, Vec<String>)>, KvmError> {
    let kvm = open(&[])?;
    let host = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("list processor features"))?;
    let of_kvm = missing_for_baselines(&kvm);
    let missing = |baseline| (baseline, [baseline::missing(&host, baseline), of_kvm.clone()].concat());
    Ok(CpuBaseline::ALL.map(missing).into())
}

/// Opens `/dev/kvm` and checks that it offers what is needed, as a template has changed that.
fn open(changes: &[Capability]) -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Absent,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        errno => KvmError::Open(std::io::Error::from_raw_os_error(errno)),
    })?;
    if kvm.get_api_version() != API_VERSION {
        return Err(KvmError::Version(kvm.get_api_version()));
    }
    let waived = |cap: Cap| changes.iter().any(|change| !change.needed && change.number == cap as u32);
    if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !waived(*cap) && !kvm.check_extension(*cap)) {
        return Err(KvmError::Missing(name));
    }
    let missing = |change: &&Capability| change.needed && kvm.check_extension_raw(change.number.into()) <= 0;
    match changes.iter().find(missing) {
        Some(change) => Err(KvmError::NoCapability(change.number)),
        None => Ok(kvm),
    }
}
