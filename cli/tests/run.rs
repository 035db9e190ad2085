//! `bedplate run` with a VMM that is played by this very test program: what the command does around a VM, from the disk it
//! makes to what it leaves behind. Real guests are run by the lab tests.

// Helpers of tests are tests: a panic there is the failure report.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bedplate_api::vmm::VmConfig;

const ARGUMENTS: &str = "BEDPLATE_TEST_VMM_ARGUMENTS";

/// Not a test: the VMM of the tests below, in a process of its own. It says what it boots, echoes what it hears, and powers
/// off at a `q`.
#[test]
fn act_as_vmm() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let value = |name: &str| {
        let mut words = arguments.split_whitespace();
        words.find(|word| *word == name).and_then(|_| words.next()).unwrap().to_owned()
    };
    let end = |reason: &str| {
        fs::write(value("--exit-file"), format!(r#"{{"reason":"{reason}","detail":"as the test wants"}}"#)).unwrap();
    };
    let serial = value("--serial");
    if let Some(file) = serial.strip_prefix("file:") {
        fs::write(file, "ABCDEF").unwrap();
        return end("guest_reset");
    }
    let config: VmConfig = serde_json::from_slice(&fs::read(value("--config-file")).unwrap()).unwrap();
    let disk = Path::new(config.drives[0].path_on_host.as_ref().unwrap());
    assert!(disk.join("disk.json").exists());
    let listener = UnixListener::bind(serial.strip_prefix("socket:").unwrap()).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let boot = config.boot_source.unwrap();
    match (boot.kernel_image_path, boot.firmware_path) {
        (Some(kernel), None) => {
            let kernel = fs::read(kernel).unwrap();
            write!(stream, "{} bytes of kernel, {}\r\n", kernel.len(), boot.boot_args.unwrap()).unwrap();
        }
        (None, Some(firmware)) => {
            write!(stream, "{} bytes of firmware\r\n", fs::read(firmware).unwrap().len()).unwrap();
        }
        both => panic!("{both:?}"),
    }
    if let Some(interface) = config.network_interfaces.first() {
        let tap = interface.host_dev_name.as_ref().unwrap();
        let look = format!("ip -o -4 addr show dev {tap}; nft list tables; nft list ruleset");
        stream.write_all(&Command::new("sh").args(["-c", &look]).output().unwrap().stdout).unwrap();
    }
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"q" {
        stream.write_all(&byte).unwrap();
    }
    end("guest_power_off");
}

struct Place {
    dir: tempfile::TempDir,
    vmm: PathBuf,
}

impl Place {
    /// `None` where /dev/kvm does not open, since the command refuses to begin then.
    fn new() -> Option<Self> {
        if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("skipped: needs /dev/kvm");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let vmm = dir.path().join("vmm");
        let this = std::env::current_exe().unwrap();
        let script = format!("#!/bin/sh\n{ARGUMENTS}=\"$*\" exec {} --exact act_as_vmm --nocapture\n", this.display());
        fs::write(&vmm, script).unwrap();
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("disk.raw"), vec![3; 1 << 20]).unwrap();
        fs::write(dir.path().join("kernel"), [1; 77]).unwrap();
        Some(Self { dir, vmm })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, more: &[&str]) -> Child {
        self.spawn(Command::new(env!("CARGO_BIN_EXE_bedplate")), more)
    }

    fn spawn(&self, command: Command, more: &[&str]) -> Child {
        self.run(command, &[&["./disk.raw", "--kernel", "kernel"], more].concat())
    }

    fn run(&self, mut command: Command, words: &[&str]) -> Child {
        command
            .args(["run", "--vmm"])
            .arg(&self.vmm)
            .args(words)
            .current_dir(self.dir.path())
            .env("BEDPLATE_STORE", self.path("store"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Names in a directory of the store.
    fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path("store").join(dir)).map(|e| e.collect::<Vec<_>>()).unwrap_or_default();
        entries.into_iter().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Types `keys` once the VM is there, and returns exit code, stdout and stderr.
fn drive(mut child: Child, keys: &[u8]) -> (Option<i32>, String, String) {
    let mut stdout = child.stdout.take().unwrap();
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"\n") && stdout.read(&mut byte).unwrap() == 1 {
        said.push(byte[0]);
    }
    let mut stdin = child.stdin.take().unwrap();
    // A command that has refused to begin is gone by now; its exit code says so.
    let _ = stdin.write_all(keys);
    stdout.read_to_end(&mut said).unwrap();
    drop(stdin);
    let out = child.wait_with_output().unwrap();
    (out.status.code(), String::from_utf8(said).unwrap(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn a_vm_boots_its_console_is_here_and_nothing_is_left() {
    let Some(place) = Place::new() else { return };
    let (code, said, errors) = drive(place.start(&["--cmdline", "quiet"]), b"hello\x01aq");
    assert_eq!(code, Some(0), "{errors}");
    assert!(said.starts_with("77 bytes of kernel, console=ttyS0 reboot=k panic=-1 quiet\r\n"), "{said}");
    assert!(said.ends_with("hello\u{1}"), "{said:?}");
    assert_eq!(place.names("runs"), [""; 0]);
    assert_eq!(place.names("disks"), [""; 0]);
}

#[test]
fn a_disk_can_be_started_by_firmware() {
    let Some(place) = Place::new() else { return };
    let bedplate = Command::new(env!("CARGO_BIN_EXE_bedplate"));
    let (code, said, errors) = drive(place.run(bedplate, &["./disk.raw", "--firmware", "kernel"]), b"q");
    assert_eq!((code, said.as_str()), (Some(0), "77 bytes of firmware\r\n"), "{errors}");
}

#[test]
fn ctrl_a_x_stops_it_at_once() {
    let Some(place) = Place::new() else { return };
    let (code, _, errors) = drive(place.start(&[]), b"\x01x");
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(place.names("runs"), [""; 0]);
}

#[test]
fn a_persistent_disk_stays_and_belongs_to_its_image() {
    let Some(place) = Place::new() else { return };
    for _ in 0..2 {
        let (code, _, errors) = drive(place.start(&["--persistent", "--name", "mine"]), b"q");
        assert_eq!(code, Some(0), "{errors}");
        assert_eq!(place.names("disks"), ["mine"]);
    }
    fs::write(place.path("disk.raw"), vec![4; 1 << 20]).unwrap();
    let (code, _, errors) = drive(place.start(&["--persistent", "--name", "mine"]), b"q");
    assert!(code == Some(1) && errors.contains("--name"), "{errors}");
}

#[test]
fn a_killed_run_is_swept_by_the_next_and_its_vmm_dies_with_it() {
    let Some(place) = Place::new() else { return };
    let mut child = place.start(&[]);
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    assert_eq!(place.names("runs").len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(place.names("runs").len(), 1, "nobody was left to remove it");
    let (code, _, errors) = drive(place.start(&[]), b"q");
    assert_eq!((code, place.names("runs").len()), (Some(0), 0), "{errors}");
}

#[test]
fn a_signal_ends_it_in_order() {
    let Some(place) = Place::new() else { return };
    let mut child = place.start(&[]);
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(place.names("runs"), [""; 0]);
}

#[test]
fn a_network_is_there_while_the_vm_is_and_gone_with_it() {
    let Some(place) = Place::new() else { return };
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: needs root");
    }
    // A network namespace of its own: the machine's network is nobody's playground.
    let mut command = Command::new("unshare");
    let has_nft = Command::new("nft").arg("--version").output().is_ok();
    let tables = if has_nft { "nft list tables" } else { "true" };
    let script = format!("\"$@\"; ip -o link; {tables}");
    command.args(["--net", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_bedplate")]);
    let (code, said, errors) = drive(place.spawn(command, &["--net"]), b"q");
    assert_eq!(code, Some(0), "{errors}");
    let (during, after) = said.split_once("1: lo").unwrap_or_else(|| panic!("{said} {errors}"));
    assert!(during.contains("10.79.1.1/30"), "{during}");
    assert!(!after.contains("bprun") && !after.contains("table"), "{after}");
    if has_nft {
        assert!(during.contains("masquerade"), "{during}");
    }
    assert!(errors.contains("10.79.1.2"), "{errors}");
}

#[test]
fn what_cannot_be_run_is_refused_with_a_reason() {
    let Some(place) = Place::new() else { return };
    let refused = |args: &[&str], words: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_bedplate"))
            .arg("run")
            .args(args)
            .arg("--vmm")
            .arg(&place.vmm)
            .current_dir(place.dir.path())
            .env("BEDPLATE_STORE", place.path("store"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{word:?} is not in {said:?}"));
        assert_eq!(place.names("runs"), [""; 0]);
    };
    refused(&["no-such"], &["no-such", "image ls"]);
    refused(&["./no-such.raw"], &["no-such.raw"]);
    refused(&["./disk.raw"], &["no kernel", "--kernel"]);
    refused(&["./disk.raw", "--kernel", "absent"], &["absent"]);
    refused(&["./disk.raw", "--firmware", "absent"], &["absent"]);
}
