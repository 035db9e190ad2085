//! Kernel modules: those named in `/etc/bedplate/modules`, the KVM of this machine's processor, and what they need.
//!
//! `module.parameter=value` on the kernel's command line goes to that module, as modprobe(8) does it.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::console::say;

/// Loaded where the kernel has them, and not missed where it has not: the power key.
const OPTIONAL: [&str; 2] = ["button", "evdev"];

/// A kernel's modules, by normal name: the file of each and what it needs, nearest first.
#[derive(Debug, Default)]
struct Index {
    files: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

/// Loads everything that is asked for, with the parameters on the kernel's command line. What fails is named, and the
/// rest is loaded all the same.
pub(super) fn load_all(cmdline: &str) {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let dir = Path::new("/lib/modules").join(release);
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let index = Index::parse(&read("modules.dep"), &read("modules.builtin"));
    let asked = fs::read_to_string("/etc/bedplate/modules").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let names = wanted(&asked, kvm_module(&cpuinfo));
    let mut loaded = HashSet::new();
    for name in &names {
        for file in index.closure(name) {
            if loaded.insert(file.clone())
                && let Err(why) = load(&dir.join(&file), &parameters(&name_of(&file), cmdline))
            {
                say(&format!("module {file} could not be loaded: {why}"));
            }
        }
        if !index.has(name) && !OPTIONAL.contains(&name.as_str()) {
            say(&format!("this kernel has no module {name}"));
        }
    }
}

/// The names to load, normal and each once. The KVM of another make of processor is left out.
fn wanted(asked: &str, kvm: Option<&str>) -> Vec<String> {
    let asked = asked.lines().map(|l| l.split('#').next().unwrap_or_default().trim()).filter(|l| !l.is_empty());
    let mut names: Vec<String> = Vec::new();
    for name in asked.chain(kvm).chain(OPTIONAL).map(normal) {
        let other_kvm = name.starts_with("kvm_") && Some(name.as_str()) != kvm;
        if !other_kvm && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The KVM module of this make of processor.
fn kvm_module(cpuinfo: &str) -> Option<&'static str> {
    let vendor = cpuinfo.lines().find_map(|l| l.strip_prefix("vendor_id")?.split_once(':'))?.1.trim();
    match vendor {
        "AuthenticAMD" | "HygonGenuine" => Some("kvm_amd"),
        "GenuineIntel" | "CentaurHauls" | "  Shanghai  " => Some("kvm_intel"),
        _ => None,
    }
}

/// Hyphens and underscores mean the same in a module's name.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The normal name of the module in `file`.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    normal(base.split(".ko").next().unwrap_or(base))
}

impl Index {
    fn parse(dep: &str, builtin: &str) -> Self {
        let files = dep.lines().filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            Some((name_of(file), (file.to_owned(), needs.split_ascii_whitespace().map(str::to_owned).collect())))
        });
        Self { files: files.collect(), builtin: builtin.lines().map(name_of).collect() }
    }

    fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.builtin.contains(name)
    }

    /// The files to load for `name`, in this order.
    fn closure(&self, name: &str) -> Vec<String> {
        let Some((file, needs)) = self.files.get(name) else { return Vec::new() };
        needs.iter().rev().chain([file]).cloned().collect()
    }
}

/// The words of the command line that are for this module, without its name.
fn parameters(module: &str, cmdline: &str) -> CString {
    let words = cmdline.split_ascii_whitespace().filter_map(|word| {
        let (name, parameter) = word.split_once('.')?;
        // The value may have points of its own, the name may not.
        (!name.contains('=') && normal(name) == module).then_some(parameter)
    });
    // The kernel's command line has no zero byte inside.
    CString::new(words.collect::<Vec<_>>().join(" ")).unwrap_or_default()
}

fn load(path: &PathBuf, parameters: &CString) -> Result<(), String> {
    if path.extension().is_some_and(|e| e != "ko") {
        return Err(
            "it is compressed, which this init does not read; put it into the image as a plain .ko file".to_owned()
        );
    }
    let file = File::open(path).map_err(|e| e.to_string())?;
    match rustix::system::finit_module(&file, parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(match e {
            rustix::io::Errno::NODEV => "this machine has no device for it".to_owned(),
            rustix::io::Errno::OPNOTSUPP => "this machine cannot do it, or its firmware has it switched off".to_owned(),
            _ => io::Error::from(e).to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/arch/x86/kvm/kvm-amd.ko: kernel/drivers/crypto/ccp/ccp.ko kernel/arch/x86/kvm/kvm.ko kernel/virt/lib/irqbypass.ko\n\
                       kernel/drivers/net/tun.ko.xz:\n\
                       kernel/arch/x86/kvm/kvm.ko: kernel/virt/lib/irqbypass.ko\n";

    #[test]
    fn what_a_module_needs_comes_before_it_the_farthest_first() {
        let index = Index::parse(DEP, "kernel/fs/ext4/ext4.ko\n");
        let order: Vec<String> = index.closure("kvm_amd").iter().map(|f| name_of(f)).collect();
        assert_eq!(order, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
        assert!(index.has("ext4") && index.closure("ext4").is_empty());
        assert!(index.has("tun") && !index.has("nope"));
        assert!(load(&"/x/tun.ko.xz".into(), &CString::default()).unwrap_err().contains("compressed"));
    }

    #[test]
    fn a_module_gets_its_parameters_from_the_command_line() {
        let cmdline = "quiet kvm-amd.npt=0 root=kvm_amd.x kvm_amd.vgif=0 kvm.mitigations=off\n";
        assert_eq!(parameters("kvm_amd", cmdline).as_c_str(), c"npt=0 vgif=0");
        assert_eq!(parameters("tun", cmdline).as_c_str(), c"");
    }

    #[test]
    fn the_kvm_of_this_processor_is_loaded_and_no_other() {
        let kvm = kvm_module("processor\t: 0\nvendor_id\t: AuthenticAMD\n");
        assert_eq!(kvm, Some("kvm_amd"));
        let names = wanted("virtio-net # the network\n\nkvm-amd\nkvm-intel\n", kvm);
        assert_eq!(names, ["virtio_net", "kvm_amd", "button", "evdev"]);
    }
}
