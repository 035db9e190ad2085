//! The sandbox from outside: ways that lead through it, and what it refuses. What it holds back is a lab test's to see.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod rig;

use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use bedplate_api::vmm::ExitReason;
use rig::{Api, RESET, Rig, Running, SPIN, START, eventually, has_kvm, request, vmm};
use rustix::process::{Pid, Resource, Rlimit, geteuid, prlimit};

/// `again: mov dx, 0x3fd; wait: in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx; out dx, al; jmp again`
const ECHO: [u8; 17] =
    [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef];

#[test]
fn files_are_found_by_the_names_that_they_were_given() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&RESET]);
    for dir in ["real", "other"] {
        std::fs::create_dir(rig.path(dir)).unwrap();
    }
    symlink("real", rig.path("link")).unwrap();
    symlink(rig.path("link"), rig.path("far")).unwrap();
    let config = rig.config("");
    for name in ["../real/e", "../link/e", "../far/e", "../far/../other/e"] {
        let mut command = vmm();
        command.current_dir(rig.path("other")).arg("--config-file").arg(&config).args(["--exit-file", name]);
        command.args(["--api-sock", "../link/socket"]);
        let status = Running(command.spawn().unwrap()).ended();
        let file = rig.path("other").join(name);
        assert!(status.success() && file.exists(), "{name}: {status}");
        std::fs::remove_file(file).unwrap();
        assert!(!rig.path("real/socket").exists(), "the socket was not removed by its name");
    }
    // Nothing was made on the way.
    let count = |dir| std::fs::read_dir(rig.path(dir)).unwrap().count();
    assert_eq!((count("other"), count("real")), (0, 0));
}

#[test]
fn what_cannot_be_kept_is_refused() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&RESET]);
    assert!(rig.refusal_with(&["--visible", "/"], "").contains("it is the root, and everything would be"));
    assert!(rig.refusal_with(&["--visible", "/nowhere"], "").contains("there is no such directory"));
    let nobody = ["--uid", "4294967295", "--gid", "1"];
    let output = vmm().arg("--config-file").arg(rig.config("")).args(nobody).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    if geteuid().is_root() {
        // The directory is root's.
        let output = rig.run_with(&["--uid", "54321", "--gid", "54321"], "");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("user 54321, without privileges, cannot write to"), "{stderr}");
    }
}

#[test]
fn a_file_has_no_source_of_chunks() {
    if !has_kvm() {
        return;
    }
    let api = Api::new();
    let (disk, socket) = (api.rig.path("disk"), api.rig.path("chunks"));
    std::fs::write(&disk, [0; 4096]).unwrap();
    api.start();
    let source = format!(r#"{{"socket": {socket:?}}}"#);
    let drive =
        format!(r#"{{"drive_id": "d", "path_on_host": {disk:?}, "is_root_device": false, "chunk_source": {source}}}"#);
    let said = api.refusal("PUT", "/drives/d", &drive);
    assert!(said.contains("leave chunk_source out"), "{said}");
    api.stop();
}

#[test]
fn a_process_that_is_half_inside_ends() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SPIN]);
    std::fs::create_dir(rig.path("shown")).unwrap();
    let mut command = rig.command();
    command.arg("--api-sock").arg(rig.path("api")).arg("--visible").arg(rig.path("shown"));
    let mut process = Running(command.spawn().unwrap());
    let ask = |path: &str, body: &str| request(&rig.path("api"), "PUT", path, body);
    assert_eq!(ask("/boot-source", &format!(r#"{{"kernel_image_path": {:?}}}"#, rig.path("kernel"))).0, 204);
    std::fs::remove_dir(rig.path("shown")).unwrap();
    let (status, body) = ask("/actions", START);
    assert!(status == 400 && body.contains("shown") && body.contains("check that it is there"), "{body}");
    assert_eq!(process.wait(), 1);
    assert!(!rig.path("shown").exists(), "it was made again");
}

#[test]
fn a_process_that_is_inside_and_gets_no_thread_ends() {
    // Of root nobody counts the threads, so that it has to become somebody else.
    if !has_kvm() || !geteuid().is_root() {
        return;
    }
    const USER: u32 = 54321;
    let rig = Rig::new(&[&SPIN]);
    let dir = rig.path("");
    std::os::unix::fs::chown(&dir, Some(USER), Some(USER)).unwrap();
    let (uid, gid) = (USER.to_string(), USER.to_string());
    let mut command = rig.command();
    command.arg("--api-sock").arg(rig.path("api")).args(["--uid", &uid, "--gid", &gid]);
    let mut process = Running(command.spawn().unwrap());
    let ask = |path: &str, body: &str| request(&rig.path("api"), "PUT", path, body);
    assert_eq!(ask("/boot-source", &format!(r#"{{"kernel_image_path": {:?}}}"#, rig.path("kernel"))).0, 204);
    let pid = Pid::from_raw(process.0.id().try_into().unwrap());
    prlimit(pid, Resource::Nproc, Rlimit { current: Some(1), maximum: Some(1) }).unwrap();
    let (status, body) = ask("/actions", START);
    assert!(status == 400 && body.contains("threads"), "{body}");
    assert_eq!(process.wait(), 1);
    assert_eq!(rig.exit().reason, ExitReason::HostFault);
}

#[test]
fn what_is_pasted_comes_whole() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&ECHO]);
    let mut command = rig.command();
    command.arg("--config-file").arg(rig.config("")).stdin(Stdio::piped());
    let mut process = Running(command.spawn().unwrap());
    let typed: Vec<u8> = (0..3000).map(|n| b'a' + (n % 26) as u8).collect();
    // Stays open: its end would have the rest read, too.
    let mut stdin = process.0.stdin.take().unwrap();
    stdin.write_all(&typed).unwrap();
    let mut stdout = process.0.stdout.take().unwrap();
    let mut echoed = vec![0; typed.len()];
    let reader = std::thread::spawn(move || stdout.read_exact(&mut echoed).map(|()| echoed));
    eventually("all of it comes back", || reader.is_finished().then_some(()));
    assert!(reader.join().unwrap().unwrap() == typed);
}

#[test]
fn without_descriptors_clients_are_sent_away_and_others_served_later() {
    let api = Api::new();
    assert_eq!(api.ask("GET", "/", "").0, 200);
    let pid = Pid::from_child(&api.process.0);
    let open = std::fs::read_dir(format!("/proc/{}/fd", api.process.0.id())).unwrap();
    let open: Vec<u64> = open.map(|fd| fd.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    let free = (0..).find(|fd| !open.contains(fd)).unwrap();
    let limit = |current| {
        prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(current), maximum: Some(4096) }).unwrap();
    };
    // The connection of before may go, and make room for one.
    limit(free);
    let mut clients: Vec<_> = (0..40).map(|_| UnixStream::connect(api.rig.path("api")).unwrap()).collect();
    let mut last = clients.pop().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap(), 0, "there was a descriptor for it");
    drop(clients);
    limit(4096);
    assert_eq!(api.ask("GET", "/", "").0, 200);
    api.stop();
}

#[test]
fn a_log_that_nobody_reads_holds_nothing_up() {
    let api = Api::new();
    let disk = api.rig.path("disk");
    std::fs::write(&disk, [0; 100]).unwrap();
    let drive = format!(r#"{{"drive_id": "d", "path_on_host": {disk:?}, "is_root_device": false}}"#);
    api.put("/drives/d", &drive);
    if !api.start() {
        return api.stop();
    }
    // Each is a warning, of a length that is no multiple of a sector, on a stderr that is a pipe.
    for _ in 0..600 {
        let body = format!(r#"{{"drive_id": "d", "path_on_host": {disk:?}}}"#);
        assert_eq!(api.ask("PATCH", "/drives/d", &body), (204, String::new()));
    }
    api.stop();
}
