//! Network interfaces: between node and guest, and between guests.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use bedplate_lab::Process;
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::tools::{busybox, numbered_file, remove_tap, tap};

/// Large enough for segmentation offload to be used, and for a lost packet to show.
const MIB: u64 = 24;

pub fn host_and_guest() -> Result<()> {
    tap("tap-a", Some("10.5.0.1/24"))?;
    let result = with_host();
    remove_tap("tap-a")?;
    result
}

fn with_host() -> Result<()> {
    let guest = GuestSpec::new("net").network("tap-a", "02:00:00:00:05:02").cmdline("tiny.ip=10.5.0.2/24").boot()?;
    ensure!(guest.run("cat /sys/class/net/eth0/address")? == "02:00:00:00:05:02");
    guest.run("ping -c 3 -W 10 10.5.0.1 > /dev/null")?;
    busybox(&["ping", "-c", "3", "-W", "10", "10.5.0.2"])?;
    let page = busybox(&["wget", "-q", "-O", "-", "http://10.5.0.2/"])?;
    ensure!(page.starts_with("tiny"), "the guest's page says {page:?}");

    fs::create_dir_all("/run/www")?;
    numbered_file(Path::new("/run/www/big"), MIB)?;
    let sum = busybox(&["md5sum", "/run/www/big"])?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let mut server = Command::new("/bin/busybox");
    server.args(["httpd", "-f", "-p", "10.5.0.1:8080", "-h", "/run/www"]).stdin(Stdio::null());
    let _server = Process::start("web server of the node", server)?;
    // It listens when the first connection is taken.
    guest.run("until wget -q -O /tmp/big http://10.5.0.1:8080/big; do usleep 100000; done")?;
    let got = guest.run("md5sum /tmp/big")?;
    ensure!(got.starts_with(sum), "node to guest: {got} instead of {sum}");

    guest.run("mv /tmp/big /run/www/back")?;
    busybox(&["wget", "-q", "-O", "/run/back", "http://10.5.0.2/back"])?;
    let got = busybox(&["md5sum", "/run/back"])?;
    ensure!(got.starts_with(sum), "guest to node: {got} instead of {sum}");
    fs::remove_file("/run/back")?;
    Ok(())
}

pub fn guest_and_guest() -> Result<()> {
    tap("tap-b", None)?;
    tap("tap-c", None)?;
    busybox(&["brctl", "addbr", "bridge"])?;
    for port in ["tap-b", "tap-c"] {
        busybox(&["brctl", "addif", "bridge", port])?;
    }
    busybox(&["ip", "link", "set", "bridge", "up"])?;
    let result = with_bridge();
    busybox(&["ip", "link", "set", "bridge", "down"])?;
    busybox(&["brctl", "delbr", "bridge"])?;
    remove_tap("tap-b")?;
    remove_tap("tap-c")?;
    result
}

fn with_bridge() -> Result<()> {
    let guest = |name: &str, tap: &str, number: u8| {
        let spec = GuestSpec::new(name).network(tap, &format!("02:00:00:00:06:0{number}"));
        spec.cmdline(&format!("tiny.ip=10.6.0.{number}/24 systemd.hostname={name}")).start()
    };
    let (left, right) = (guest("left", "tap-b", 1)?, guest("right", "tap-c", 2)?);
    left.ready()?;
    right.ready()?;
    ensure!(left.run("wget -q -O - http://10.6.0.2/")? == "tiny right");
    ensure!(right.run("wget -q -O - http://10.6.0.1/")? == "tiny left");
    // Both ends are guests: checksums that nobody fills in would be noticed here.
    left.run("dd if=/dev/urandom of=/run/www/data bs=1M count=8 2>/dev/null")?;
    let sum = left.run("md5sum < /run/www/data")?;
    ensure!(right.run("wget -q -O - http://10.6.0.1/data | md5sum")? == sum, "guest to guest: other bytes arrived");
    Ok(())
}
