//! The virtio console: the guest's `hvc0`.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::patience::until;
use serde_json::json;

use crate::serial::{connect, expect};

const SOCKET: &str = "/run/hvc.sock";

/// Bytes both ways, a size that changes, and a reader that does not read.
pub fn socket() -> Result<()> {
    let spec = GuestSpec::new("hvc").section("console", json!({"socket": SOCKET, "columns": 100, "rows": 30}));
    let mut guest = spec.boot()?;
    let mut first = connect(SOCKET)?;
    let until_size = |size: &str| format!("until [ \"$(stty size <&3)\" = '{size}' ]; do usleep 100000; done");
    let size = until_size("30 100");
    guest.begin(&format!("exec 3<>/dev/hvc0; stty raw -echo <&3; echo guest says >&3; {size}; head -n 1 <&3"))?;
    expect(&mut first, "guest says\n")?;
    first.write_all(b"host says\n")?;
    let (printed, _) = guest.finish()?;
    ensure!(printed.ends_with("host says"), "{printed:?}");
    // Who comes later gets what was said before.
    expect(&mut connect(SOCKET)?, "guest says\n")?;
    // What was typed before anybody read is not lost.
    first.write_all(b"too early\n")?;
    let printed = guest.run("exec 3<>/dev/hvc0; stty raw -echo <&3; head -n 1 <&3")?;
    ensure!(printed == "too early", "{printed:?}");

    let said = guest.api("PATCH", "/bedplate/console", r#"{"columns": 132}"#, 400)?;
    ensure!(said.contains("rows"), "{said}");
    guest.begin(&format!("exec 3<>/dev/hvc0; {}", until_size("43 132")))?;
    guest.api("PATCH", "/bedplate/console", r#"{"columns": 132, "rows": 43}"#, 204)?;
    let (printed, code) = guest.finish()?;
    ensure!(code == "0", "{printed}");
    ensure!(guest.api("GET", "/vm/config", "", 200)?.contains(r#""columns":132"#));

    // Nobody reads: the guest is not held up, and who is too slow loses the oldest.
    guest
        .run("exec 3<>/dev/hvc0; stty raw -echo <&3; head -c 400000 /dev/zero | tr '\\0' x >&3; echo last words >&3")?;
    expect(&mut first, "last words\n")?;
    ensure!(guest.count("console", "output_bytes")? >= 400_000 && guest.count("console", "guest_faults")? == 0);
    ensure!(guest.count("console", "input_bytes")? == 20);
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    ensure!(!Path::new(SOCKET).exists(), "the socket stays behind");
    Ok(())
}

/// `console=hvc0`: what the kernel says, and what init hears and says; and a file in the place of a socket.
pub fn system() -> Result<()> {
    // The serial one is for init's first words: the driver is a module. Quiet, because the kernel says again there what it has
    // said before, and a node with one processor changes to the device's thread for every 16 bytes of it.
    let spec = GuestSpec::new("hvc-system").boot_args("console=ttyS0 console=hvc0 quiet panic=-1 reboot=k");
    let mut guest = spec.section("console", json!({"socket": SOCKET})).boot()?;
    let mut console = connect(SOCKET)?;
    console.write_all(b"echo '<1>the kernel says' $((6 * 8)) > /dev/kmsg\n")?;
    expect(&mut console, "the kernel says 48").with_context(|| guest.last_words())?;
    console.write_all(b"echo $((6 * 7)) is said > /dev/console\n")?;
    expect(&mut console, "42 is said")?;
    console.write_all(b"poweroff -f\n")?;
    guest.ended_well("guest_power_off")?;

    let log = "/run/hvc.log";
    let _ = fs::remove_file(log);
    let guest = GuestSpec::new("hvc-file").section("console", json!({"file": log})).boot()?;
    guest.run("echo into a file > /dev/hvc0")?;
    until("the file to have it", Duration::from_secs(60), || {
        Ok(fs::read_to_string(log)?.contains("into a file").then_some(()))
    })?;
    Ok(())
}
