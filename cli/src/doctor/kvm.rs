//! Hardware virtualization, from the processor to a guest that really runs.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::guest::{self, Trial};
use super::{Finding, Subject};
use crate::vmm::{VmmError, Walls};

const LAB: &str = "use `bedplate run --lab` for a VM in an emulated machine (slow, but complete)";

pub(super) fn examine(vmm: Result<PathBuf, VmmError>) -> Vec<Finding> {
    let (vmm_finding, vmm) = match vmm {
        Ok(path) => (the_vmm().ok(path.display().to_string()), Some(path)),
        Err(e) => (the_vmm().missing(e.to_string(), "install it beside this program, or name it with --vmm"), None),
    };
    let kvm = device();
    let walls = sandbox(vmm.as_deref());
    vec![processor(), kvm, vmm_finding, guest(vmm), walls]
}

const fn the_vmm() -> Subject {
    Subject::required("bedplate-vmm", "running VMs: one process for each")
}

fn processor() -> Finding {
    let subject = Subject::optional("processor", "running guests at full speed");
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| flags.lines().any(|l| l.starts_with("flags") && l.split_whitespace().any(|f| f == flag));
    match (has("svm"), has("vmx")) {
        (true, _) => subject.ok("AMD SVM"),
        (_, true) => subject.ok("Intel VMX"),
        _ => subject.missing(
            "neither svm nor vmx among its flags",
            "switch virtualization on in the firmware's setup; in a virtual machine, ask for nested virtualization",
        ),
    }
}

/// Whether /dev/kvm is there for us.
pub(crate) fn open_kvm() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm")
}

fn device() -> Finding {
    let subject = Subject::required("/dev/kvm", "running guests on the processor itself");
    match open_kvm() {
        Ok(_) => subject.ok("opens for reading and writing"),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => subject.missing(
            "permission denied",
            "join the group that owns it (`sudo usermod -aG kvm $USER`, then log in again), or run as root",
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => subject.missing(
            "not there",
            format!("load the module (`modprobe kvm-intel` or `modprobe kvm-amd`); where that cannot be, {LAB}"),
        ),
        Err(e) => subject.missing(e.to_string(), LAB),
    }
}

fn guest(vmm: Option<PathBuf>) -> Finding {
    let subject = Subject::required("guest", "booting unmodified kernels");
    let Some(vmm) = vmm else { return subject.missing("not tried: there is no bedplate-vmm", "see bedplate-vmm") };
    if open_kvm().is_err() {
        return subject.missing("not tried: /dev/kvm does not open", "see /dev/kvm");
    }
    match try_guest(&vmm, Walls::None) {
        Ok(Trial::Works) => subject.ok("a test guest ran the instructions that every kernel needs"),
        Ok(Trial::Fails(words)) => subject.missing(words, format!("this KVM cannot run an unmodified kernel; {LAB}")),
        Err(e) => subject.missing(e.to_string(), LAB),
    }
}

/// Whether a VMM gets into its sandbox here, whatever its guest does then.
fn sandbox(vmm: Option<&Path>) -> Finding {
    let subject = Subject::required("sandbox", "keeping a guest that takes over its VMM from everything else");
    let Some(vmm) = vmm.filter(|_| open_kvm().is_ok()) else {
        return subject.missing("not tried: no VMM can run here", "see bedplate-vmm and /dev/kvm");
    };
    match try_guest(vmm, Walls::Sandbox) {
        Ok(Trial::Fails(words)) if words.starts_with("sandbox: ") => {
            subject.missing(words, "see what it says, or use `bedplate run --no-sandbox` with guests that you trust")
        }
        Ok(_) => subject.ok("a VMM could put its walls up"),
        Err(e) => subject.missing(e.to_string(), "use `bedplate run --no-sandbox` with guests that you trust"),
    }
}

/// Runs the test guest in a directory of its own. What `bedplate run` asks before it begins.
pub(crate) fn try_guest(vmm: &Path, walls: Walls) -> Result<Trial, VmmError> {
    let dir = std::env::temp_dir().join(format!("bedplate-probe-{}", std::process::id()));
    let made = fs::create_dir(&dir).or_else(|e| match e.kind() {
        // A leftover of a killed process that had our id.
        io::ErrorKind::AlreadyExists => fs::remove_dir_all(&dir).and_then(|()| fs::create_dir(&dir)),
        _ => Err(e),
    });
    made.map_err(|source| VmmError::File { what: "create", path: dir.clone(), source })?;
    let trial = guest::run(vmm, &dir, walls);
    let _ = fs::remove_dir_all(&dir);
    trial
}
