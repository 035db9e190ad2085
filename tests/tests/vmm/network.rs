//! Network interfaces: between node and guest, and between guests.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use bedplate_lab::Process;
use bedplate_node::net::tap::create;
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{busybox, numbered_file, remove_tap, tap, tun, with_tap};
use serde_json::{Value, json};

/// Large enough for segmentation offload to be used, and for a lost packet to show.
const MIB: u64 = 24;

pub fn host_and_guest() -> Result<()> {
    with_tap("tap-a", "10.5.0.1/24", with_host)
}

fn with_host() -> Result<()> {
    let guest = GuestSpec::new("net").network("tap-a", "02:00:00:00:05:02").cmdline("tiny.ip=10.5.0.2/24").boot()?;
    ensure!(guest.run("cat /sys/class/net/eth0/address")? == "02:00:00:00:05:02");
    ensure!(guest.run("ls -1 /sys/class/net/eth0/queues")? == "rx-0\ntx-0");
    guest.run("ping -c 3 -W 10 10.5.0.1 > /dev/null")?;
    busybox(&["ping", "-c", "3", "-W", "10", "10.5.0.2"])?;
    let page = busybox(&["wget", "-q", "-O", "-", "http://10.5.0.2/"])?;
    ensure!(page.starts_with("tiny"), "the guest's page says {page:?}");
    in_bulk(&guest, 5, &["wget"])
}

/// A file goes from the node (10.N.0.1) to the guest (10.N.0.2) and back, once for each way in which it is fetched there.
pub fn in_bulk(guest: &Guest, net: u8, ways: &[&str]) -> Result<()> {
    fs::create_dir_all("/run/www")?;
    numbered_file(Path::new("/run/www/big"), MIB)?;
    let sum = busybox(&["md5sum", "/run/www/big"])?;
    let sum = sum.split(' ').next().unwrap_or_default();
    let mut server = Command::new("/bin/busybox");
    server.args(["httpd", "-f", "-p", &format!("10.{net}.0.1:8080"), "-h", "/run/www"]).stdin(Stdio::null());
    let _server = Process::start("web server of the node", server)?;
    for wget in ways {
        // It listens when the first connection is taken.
        let fetch = format!("{wget} -q -O /tmp/big http://10.{net}.0.1:8080/big");
        guest.run(&format!("until {fetch}; do usleep 100000; done"))?;
        let got = guest.run("md5sum /tmp/big")?;
        ensure!(got.starts_with(sum), "node to guest, {wget}: {got} instead of {sum}");

        guest.run("mv /tmp/big /run/www/back")?;
        busybox(&["timeout", "150", "wget", "-q", "-O", "/run/back", &format!("http://10.{net}.0.2/back")])?;
        let got = busybox(&["md5sum", "/run/back"])?;
        ensure!(got.starts_with(sum), "guest to node: {got} instead of {sum}");
        fs::remove_file("/run/back")?;
        guest.run("rm /run/www/back")?;
    }
    Ok(())
}

/// A tap with queues for several vCPUs.
pub fn tap_of_several(name: &str, address: &str) -> Result<()> {
    tun()?;
    create(name, true)?;
    busybox(&["ip", "addr", "add", address, "dev", name])?;
    busybox(&["ip", "link", "set", name, "up"])?;
    Ok(())
}

/// The driver lets go of the interface, which resets the device, and takes it again; then it has its address.
pub fn rebind(guest: &Guest, net: u8) -> Result<()> {
    guest.run(
        "cd /sys/bus/virtio/drivers/virtio_net && for device in virtio*; do [ -e $device/net/eth0 ] && break; done && \
         echo $device > unbind && [ ! -e /sys/class/net/eth0 ] && echo $device > bind && ip link set eth0 up",
    )?;
    guest.run(&format!("ip addr add 10.{net}.0.2/24 dev eth0 && ping -c 2 -W 10 10.{net}.0.1 > /dev/null")).map(drop)
}

/// What the device has finished, by the number of the queue.
pub fn used(guest: &Guest, device: &str) -> Result<BTreeMap<u64, u64>> {
    let inspection: Value = serde_json::from_str(&guest.api("GET", "/bedplate/inspect", "", 200)?)?;
    let words = || guest.run("ip link; dmesg | grep -i virtio | tail -n 20").unwrap_or_else(|error| error.to_string());
    let queues = inspection["queues"][device].as_array();
    let queues = queues.with_context(|| format!("no {device} in {inspection}; the guest: {}", words()))?;
    Ok(queues.iter().filter_map(|queue| Some((queue["index"].as_u64()?, queue["used"].as_u64()?))).collect())
}

/// Two vCPUs with a pair of queues each. What a vCPU sends goes over its own, and what comes for it, too.
pub fn two_pairs() -> Result<()> {
    tap_of_several("tap-q", "10.8.0.1/24")?;
    tap("tap-s", None)?;
    let result = with_two_pairs().and_then(|()| {
        let one = GuestSpec::new("single").network("tap-s", "02:00:00:00:08:03");
        let said = one.network_option("queue_pairs", json!(2)).refused()?;
        ensure!(said.contains("`ip tuntap add tap-s mode tap multi_queue`"), "{said:?}");
        Ok(())
    });
    remove_tap("tap-q")?;
    remove_tap("tap-s")?;
    result
}

fn with_two_pairs() -> Result<()> {
    let guest = GuestSpec::new("pairs").cpus(2).network("tap-q", "02:00:00:00:08:02").cmdline("tiny.ip=10.8.0.2/24");
    let mut guest = guest.boot()?;
    for round in 0..2 {
        ensure!(guest.run("ls -1 /sys/class/net/eth0/queues")? == "rx-0\nrx-1\ntx-0\ntx-1");
        let before = used(&guest, "net_eth0")?;
        ensure!(before.len() == 5 && before[&4] >= 1, "round {round}: nobody has used the control queue: {before:?}");
        in_bulk(&guest, 8, &["taskset 1 wget", "taskset 2 wget"])?;
        let after = used(&guest, "net_eth0")?;
        for queue in 0..4 {
            ensure!(after[&queue] != before[&queue], "round {round}: queue {queue} is idle: {before:?}, {after:?}");
        }
        rebind(&guest, 8)?;
    }
    for counter in ["guest_faults", "host_faults"] {
        ensure!(guest.count("net_eth0", counter)? == 0, "{counter}");
    }
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
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
