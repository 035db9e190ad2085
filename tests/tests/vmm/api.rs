//! The HTTP API of a VM.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_lab::Process;
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::{BZIMAGE, INITRD, unix_http};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

/// As a client of Firecracker does it: section by section, then `InstanceStart`.
pub fn configured_by_api() -> Result<()> {
    // Where Firecracker's clients look for it if nobody says where.
    let socket = std::path::Path::new("/run/firecracker.socket");
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new("/bin/bedplate-vmm");
    command.args(["--id", "by-api", "--serial", "file:/run/api-only.serial"]);
    command.stdin(Stdio::null());
    let mut process = Process::start("a VM without a configuration file", command)?;
    until("the API socket", Duration::from_secs(60), || Ok(socket.exists().then_some(())))?;
    let put = |path: &str, body: Value| -> Result<()> {
        let (status, answer) = unix_http::request(socket, "PUT", path, &body.to_string())?;
        ensure!(status == 204, "PUT {path}: {status} {answer}");
        Ok(())
    };
    let (status, early) = unix_http::request(socket, "PUT", "/actions", r#"{"action_type": "InstanceStart"}"#)?;
    ensure!(status == 400 && early.contains("fault_message"), "a start without a kernel: {status} {early}");
    put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 256}))?;
    let args = "console=ttyS0 quiet panic=-1 reboot=k";
    put("/boot-source", json!({"kernel_image_path": BZIMAGE, "initrd_path": INITRD, "boot_args": args}))?;
    put("/actions", json!({"action_type": "InstanceStart"}))?;
    let (_, info) = unix_http::request(socket, "GET", "/", "")?;
    let info: Value = serde_json::from_str(&info)?;
    ensure!(info["id"] == "by-api" && info["state"] == "Running", "GET / says {info}");
    until("the guest to be up", bedplate_tests::inside::guest::BOOT, || {
        let serial = std::fs::read_to_string("/run/api-only.serial").unwrap_or_default();
        Ok(serial.contains("TINY ready name=tiny cpus=2").then_some(()))
    })?;
    let (status, late) =
        unix_http::request(socket, "PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#)?;
    ensure!(status == 400, "a change after the start: {status} {late}");
    put("/bedplate/stop", Value::Null)?;
    ensure!(process.wait(Duration::from_secs(60))?.success(), "stopped, and not with code 0");
    Ok(())
}

pub fn bad_requests() -> Result<()> {
    let guest = GuestSpec::new("requests").boot()?;
    for (method, path, body) in [
        ("PUT", "/machine-config", "{"),
        ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128, "vcpus": 2}"#),
        ("PUT", "/actions", r#"{"action_type": "Explode"}"#),
        ("PUT", "/drives/other", r#"{"drive_id": "one", "path_on_host": "/x", "is_root_device": false}"#),
    ] {
        let answer = guest.api(method, path, body, 400)?;
        ensure!(answer.contains("fault_message"), "{method} {path} {body}: {answer}");
    }
    let huge = format!(r#"{{"action_type": "{}"}}"#, "x".repeat(4 << 20));
    // The answer may come before all of the body was taken, which a client sees as a broken pipe.
    if let Ok((status, _)) = unix_http::request(&guest.file("api.sock"), "PUT", "/actions", &huge) {
        ensure!(status == 400 || status == 413, "a body of 4 MiB: {status}");
    }
    ensure!(guest.run("echo still here")? == "still here");
    guest.api("GET", "/bedplate/status", "", 200)?;
    Ok(())
}
