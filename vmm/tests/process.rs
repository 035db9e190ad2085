//! `bedplate-vmm` as a process: what it says, what it leaves, how it ends. The guests are a few instructions in an ELF
//! file; where there is no KVM the tests that need one say so, and the lab tests cover the same.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod rig;

use std::path::Path;

use bedplate_api::vmm::ExitReason;
use rig::{RESET, Rig, Running, SAY_X, SPIN, eventually, has_kvm, kernel, request, vmm};

/// `mov dx, 0x604; mov ax, 0x3400; out dx, ax`
const POWER_OFF: [u8; 10] = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];
/// `mov dx, 0x600; again: in ax, dx; test ah, 1; jz again`
const AWAIT_BUTTON: [u8; 11] = [0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9];
/// `int3` without a usable interrupt table: a triple fault
const CRASH: [u8; 1] = [0xcc];
/// `lidt` of an empty table, then `int3`: how Linux resets by triple fault
const RESET_BY_FAULT: [u8; 18] = [0x0f, 0x01, 0x1d, 1, 0, 0, 0, 0xcc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn what_cannot_start_is_one_line_that_names_the_thing() {
    let rig = Rig::new(&[&SPIN]);
    assert!(rig.refusal(r#", "machine-config": {"vcpu_count": 99, "mem_size_mib": 64}"#).contains("vcpu_count 99"));
    assert!(
        rig.refusal(r#", "machine-config": {"vcpu_count": 1, "mem_size_mib": 1048576}"#).contains("than this host has")
    );
    if !has_kvm() {
        return;
    }
    let drive = r#", "drives": [{"drive_id": "d", "path_on_host": "/nowhere/d", "is_root_device": true}]"#;
    assert!(rig.refusal(drive).contains("drive d: /nowhere/d"));
    let net = r#", "network-interfaces": [{"iface_id": "n", "host_dev_name": "notap7"}]"#;
    assert!(rig.refusal(net).contains("no tap device notap7"));
    std::fs::write(rig.path("kernel"), &kernel(&[&SPIN])[..200]).unwrap();
    assert!(rig.refusal("").contains("damaged"));
    std::fs::remove_file(rig.path("kernel")).unwrap();
    assert!(rig.refusal("").contains("kernel: No such file"));
}

#[test]
fn a_section_that_nobody_knows_is_named_and_stops_nothing() {
    if !has_kvm() {
        return;
    }
    let output = Rig::new(&[&RESET]).run(r#", "vsock_device": null, "colour": "red""#);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.lines().count() == 1, "{stderr}");
    assert!(stderr.contains("there is no section colour, and what is in it has no effect"), "{stderr}");
}

#[test]
fn a_fifo_holds_nothing_up() {
    let rig = Rig::new(&[&SPIN]);
    let fifo = rig.fifo("fifo");
    let serial = format!("file:{}", fifo.display());
    assert!(rig.refusal_with(&["--serial", &serial], "").contains("fifo: nobody reads this FIFO; start its reader"));
    let section = format!(r#", "serial": {{"serial_out_path": {fifo:?}}}"#);
    assert!(rig.refusal(&section).contains("nobody reads this FIFO"));
    let mut log =
        Running(vmm().arg("--config-file").arg(rig.config("")).arg("--serial-log").arg(&fifo).spawn().unwrap());
    assert_eq!(log.wait(), 1);

    let mut process = rig.serve();
    let ask = |path: &str, body: &str| request(&rig.path("api"), "PUT", path, body);
    let (status, body) = ask("/serial", &format!(r#"{{"serial_out_path": {fifo:?}}}"#));
    assert!(status == 400 && body.contains("nobody reads"), "{body}");
    let (status, body) = ask("/boot-source", &format!(r#"{{"kernel_image_path": {fifo:?}}}"#));
    assert!(status == 400 && body.contains("this is a FIFO, not a regular file"), "{body}");
    let initrd = format!(r#"{{"kernel_image_path": {:?}, "initrd_path": {fifo:?}}}"#, rig.path("kernel"));
    let (status, body) = ask("/boot-source", &initrd);
    assert!(status == 400 && body.contains("initrd") && body.contains("a FIFO"), "{body}");
    assert_eq!(ask("/bedplate/stop", "").0, 204);
    assert_eq!(process.wait(), 0);
}

#[test]
fn an_exit_file_that_cannot_be_is_refused_before_anything_starts() {
    let rig = Rig::new(&[&SAY_X, &RESET, &SPIN]);
    let fifo = rig.fifo("fifo");
    for (path, word) in [(fifo.as_path(), "is a FIFO"), (Path::new("/nowhere/exit"), "No such file")] {
        let mut command = vmm();
        command.arg("--config-file").arg(rig.config("")).arg("--exit-file").arg(path);
        let output = command.arg("--serial-log").arg(rig.path("log")).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
        assert!(stderr.contains(word) && stderr.contains(path.to_str().unwrap()), "{stderr}");
        assert!(output.stdout.is_empty() && !rig.path("log").exists(), "it has started");
    }
    assert!(!std::fs::metadata(&fifo).unwrap().is_file());
}

#[test]
fn the_serial_section_leaves_the_log_on() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SAY_X, &RESET, &SPIN]);
    let output = rig.run(&format!(r#", "serial": {{"serial_out_path": {:?}}}"#, rig.path("serial")));
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b""[..]));
    assert_eq!(["log", "serial"].map(|name| std::fs::read(rig.path(name)).unwrap()), [b"x", b"x"]);
}

#[test]
fn drives_that_lead_to_no_good_are_named() {
    let rig = Rig::new(&[&RESET, &SPIN]);
    std::fs::write(rig.path("disk"), "").unwrap();
    let drive =
        |id: &str, path: &Path| format!(r#"{{"drive_id": "{id}", "path_on_host": {path:?}, "is_root_device": false}}"#);
    let disk = |id| drive(id, &rig.path("disk"));
    let refusal = rig.refusal(&format!(r#", "drives": [{}, {}]"#, disk("one"), disk("two")));
    assert!(refusal.contains(r#"drives "one" and "two" are the same file"#), "{refusal}");
    if !has_kvm() {
        return;
    }
    let refusal = rig.refusal(&format!(r#", "drives": [{}]"#, drive("null", Path::new("/dev/null"))));
    assert!(refusal.contains("drive null: disk /dev/null is a character device; give a regular file"), "{refusal}");
    let output = rig.run(&format!(r#", "drives": [{}]"#, disk("one")));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.contains(r#"drive "one""#) && stderr.contains("0 bytes"), "{stderr}");
    let vsock = format!(r#", "vsock": {{"guest_cid": 3, "uds_path": "{}"}}"#, "/x".repeat(100));
    assert!(rig.refusal(&vsock).contains("at most 107 bytes"));
}

#[test]
fn files_that_cannot_be_memory_are_named() {
    let rig = Rig::new(&[&RESET]);
    let pmem = |path: &Path| format!(r#", "pmem": [{{"id": "p", "path_on_host": {path:?}}}]"#);
    let (none, empty, file) = (rig.path("none"), rig.path("empty"), rig.path("file"));
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&file, "x").unwrap();
    for (path, words) in [(&none, "none: No such file"), (&empty, "has 0 bytes"), (&rig.fifo("fifo"), "a FIFO")] {
        let refusal = rig.refusal(&pmem(path));
        assert!(refusal.contains("pmem p: ") && refusal.contains(words), "{refusal}");
    }
    let drive = format!(r#", "drives": [{{"drive_id": "d", "path_on_host": {file:?}, "is_root_device": false}}]"#);
    let refusal = rig.refusal(&format!("{}{drive}", pmem(&file)));
    assert!(refusal.contains(r#"drive and pmem device "d" and "p" are the same file"#), "{refusal}");
    if has_kvm() {
        assert!(rig.run(&pmem(&file)).status.success());
    }
}

#[test]
fn a_socket_in_use_and_an_array_are_explained() {
    let rig = Rig::new(&[&SPIN]);
    let api = rig.path("live");
    let _live = std::os::unix::net::UnixListener::bind(&api).unwrap();
    let refusal = rig.refusal_with(&["--api-sock", api.to_str().unwrap()], "");
    assert!(refusal.contains("another process listens there; end that process"), "{refusal}");
    std::fs::write(rig.path("array"), "[]").unwrap();
    let output = vmm().arg("--config-file").arg(rig.path("array")).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("array is not a VM's configuration"), "{stderr}");
}

#[test]
fn the_guests_own_ends_are_told_apart() {
    if !has_kvm() {
        return;
    }
    for (end, reason, code) in [(&RESET[..], ExitReason::GuestReset, 0), (&POWER_OFF[..], ExitReason::GuestPowerOff, 0)]
    {
        let rig = Rig::new(&[&SAY_X, end, &SPIN]);
        let output = rig.run(r#", "vsock": {"guest_cid": 3, "uds_path": "/proc/self/nowhere"}"#);
        assert_eq!(output.status.code(), Some(1), "a vsock path that cannot be");
        let output = rig.run("");
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(code), &b"x"[..]));
        assert_eq!(rig.exit().reason, reason);
        assert_eq!(std::fs::read(rig.path("log")).unwrap(), b"x");
    }
}

#[test]
fn a_triple_fault_is_the_guests_fault_unless_it_threw_its_interrupt_table_away() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SAY_X, &CRASH, &SPIN]);
    let output = rig.run("");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    if stderr.contains("emulation failure") {
        println!("skipped: this host's KVM emulates privileged code and cannot take a triple fault");
        assert_eq!(rig.exit().reason, ExitReason::HostFault);
        return;
    }
    assert!(stderr.contains("triple fault"), "{stderr}");
    assert_eq!(rig.exit().reason, ExitReason::GuestFault);

    let rig = Rig::new(&[&RESET_BY_FAULT, &SPIN]);
    rig.run("");
    // AMD's processors forget the table on the way out.
    assert!(matches!(rig.exit().reason, ExitReason::GuestReset | ExitReason::GuestFault), "{:?}", rig.exit());
}

#[test]
fn sigterm_is_the_power_button() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SAY_X, &AWAIT_BUTTON, &POWER_OFF, &SPIN]);
    let config = rig.config("");
    let mut process = Running(rig.command().arg("--config-file").arg(config).spawn().unwrap());
    eventually("the guest runs", || std::fs::read(rig.path("log")).ok().filter(|log| log == b"x"));
    // SAFETY: plain system call; the process is our child and has not been waited for.
    unsafe { libc::kill(process.0.id() as i32, libc::SIGTERM) };
    assert_eq!(process.wait(), 0);
    assert_eq!(rig.exit().reason, ExitReason::GuestPowerOff);
}

#[test]
fn a_guest_that_does_not_listen_is_ended_by_a_second_sigterm() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SAY_X, &SPIN]);
    let (config, words) = (rig.config(""), rig.path("words"));
    let mut command = rig.command();
    command.arg("--config-file").arg(config).arg("--log-path").arg(&words).args(["--level", "Info"]);
    let mut process = Running(command.spawn().unwrap());
    eventually("the guest runs", || std::fs::read(rig.path("log")).ok().filter(|log| log == b"x"));
    // SAFETY: plain system call; the process is our child and has not been waited for.
    let terminate = || unsafe { libc::kill(process.0.id() as i32, libc::SIGTERM) };
    terminate();
    eventually("the first one is heard", || {
        std::fs::read_to_string(&words).ok().filter(|words| words.contains("pressed the power button"))
    });
    terminate();
    process.wait();
    assert_eq!((rig.exit().reason, rig.exit().detail.as_str()), (ExitReason::Stopped, "a second SIGTERM"));
}

#[test]
fn the_api_configures_starts_pauses_and_stops() {
    let rig = Rig::new(&[&SAY_X, &SPIN]);
    let mut process = rig.serve();
    let api = rig.path("api");
    let ask = |method: &str, path: &str, body: &str| request(&api, method, path, body);
    assert!(ask("GET", "/", "").1.contains(r#""state":"Not started""#));
    assert!(ask("GET", "/version", "").1.contains("firecracker_version"));
    let (status, body) = ask("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64, "what": 1}"#);
    assert_eq!(status, 400);
    assert!(body.contains("fault_message") && body.contains("what"), "{body}");
    assert_eq!(ask("PUT", "/machine-config", &" ".repeat(60_000)).0, 413);
    assert_eq!(ask("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#).0, 204);
    assert_eq!(ask("PATCH", "/machine-config", r#"{"mem_size_mib": 32}"#).0, 204);
    assert!(ask("GET", "/machine-config", "").1.contains(r#""vcpu_count":2,"mem_size_mib":32"#));
    assert_eq!(ask("PATCH", "/vm", r#"{"state": "Paused"}"#).0, 400);
    assert_eq!(ask("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#).0, 400);
    let source = format!(r#"{{"kernel_image_path": {:?}}}"#, rig.path("kernel"));
    assert_eq!(ask("PUT", "/boot-source", &source).0, 204);
    assert!(ask("GET", "/vm/config", "").1.contains("kernel_image_path"));
    if has_kvm() {
        assert_eq!(ask("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#), (204, String::new()));
        assert_eq!(ask("PUT", "/boot-source", &source).0, 400);
        for (target, state) in [("Paused", "Paused"), ("Resumed", "Running")] {
            assert_eq!(ask("PATCH", "/vm", &format!(r#"{{"state": "{target}"}}"#)).0, 204);
            assert!(ask("GET", "/bedplate/status", "").1.contains(state));
        }
        eventually("the guest speaks", || std::fs::read(rig.path("log")).ok().filter(|log| log == b"x"));
        assert_eq!(ask("PATCH", "/vm", r#"{"state": "Paused"}"#).0, 204);
    }
    assert_eq!(ask("PUT", "/bedplate/stop", "").0, 204);
    assert_eq!(process.wait(), 0);
    assert_eq!(rig.exit().reason, ExitReason::Stopped);
    assert!(!api.exists());
}
