//! What goes through a VM: blocks of a disk, and bytes over TCP.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use bedplate_tests::inside::tools::{remove_tap, tap};
use bedplate_tests::inside::{figure, rounds};
use bedplate_tests::load::{self, DiskLoad};

use crate::figures::Figure;
use crate::guests::DEBIAN;
use crate::sides::{self, Extras, Running, Way};

/// In the node's memory, so that no disk counts.
const DISK: &str = "/run/disk";
const DISK_LEN: u64 = 64 << 20;

const fn disk(write: bool, block: u32, depth: u32, count: u32) -> DiskLoad {
    DiskLoad { write, block, depth, count }
}

/// What is asked of a disk.
const BLOCKS: [(&str, DiskLoad); 6] = [
    ("4 KiB at random places, one at a time, read", disk(false, 4096, 1, 2000)),
    ("4 KiB at random places, one at a time, written", disk(true, 4096, 1, 2000)),
    ("4 KiB at random places, 32 at a time, read", disk(false, 4096, 32, 8000)),
    ("4 KiB at random places, 32 at a time, written", disk(true, 4096, 32, 8000)),
    ("1 MiB, 4 at a time, read", disk(false, 1 << 20, 4, 256)),
    ("1 MiB, 4 at a time, written", disk(true, 1 << 20, 4, 256)),
];

pub fn blocks() -> Result<()> {
    let sides = sides::all()?;
    let mut figures: Vec<_> = BLOCKS.iter().map(|(what, _)| Figure::new(what, "MiB/s", &sides)).collect();
    load::fill(Path::new(DISK), DISK_LEN)?;
    for _ in 0..rounds() {
        for (number, side) in sides.iter().enumerate() {
            let vm = side.start(DEBIAN, Extras { disk: Some(Path::new(DISK)), tap: None })?;
            vm.is_ready()?;
            // Also, so that whoever waits outside knows that it goes on.
            figure(&format!("{} is ready", side.name));
            for (of, (_, load)) in figures.iter_mut().zip(&BLOCKS) {
                let micros = micros(&vm, &format!("probe disk /dev/vda {}", load.words()))?;
                of.add(number, rate(load, micros / 1e6));
            }
        }
        // The node itself, without a VM.
        for (of, (_, load)) in figures.iter_mut().zip(&BLOCKS) {
            of.add_limit("the node without a VM", rate(load, load.run(Path::new(DISK), false)?.as_secs_f64()));
        }
    }
    fs::remove_file(DISK)?;
    figures.into_iter().for_each(|figure| figure.say(&sides));
    Ok(())
}

/// MiB in a second.
fn rate(load: &DiskLoad, seconds: f64) -> f64 {
    f64::from(load.count) * f64::from(load.block) / seconds / f64::from(1 << 20)
}

const TAP: &str = "tap-compare";
const NODE: &str = "10.9.0.1";
/// Bytes in each direction.
const STREAM: u64 = 64 << 20;
const PINGS: u32 = 2000;

pub fn frames() -> Result<()> {
    tap(TAP, Some(&format!("{NODE}/24")))?;
    let result = frames_over_tap();
    remove_tap(TAP)?;
    result
}

fn frames_over_tap() -> Result<()> {
    let mut sides = sides::all()?;
    sides.push(sides::ours("bedplate with vhost-net", Way::Vhost));
    let mut to_node = Figure::new("TCP, guest to node", "MiB/s", &sides);
    let mut to_guest = Figure::new("TCP, node to guest", "MiB/s", &sides);
    let mut mean = Figure::new("one byte to the node and back, mean", "us", &sides);
    let mut slow = Figure::new("one byte to the node and back, 99 of 100", "us", &sides);
    let rate = |micros: f64| STREAM as f64 / micros * 1e6 / f64::from(1 << 20);
    for _ in 0..rounds() {
        for (number, side) in sides.iter().enumerate() {
            let vm = side.start(DEBIAN, Extras { disk: None, tap: Some(TAP) })?;
            vm.is_ready()?;
            figure(&format!("{} is ready", side.name));
            let listener = TcpListener::bind((NODE, 0))?;
            let address = listener.local_addr()?;
            let node = thread::spawn(move || {
                load::receive(load::accept(&listener)?, STREAM)?;
                load::send(load::accept(&listener)?, STREAM)?;
                load::pong(load::accept(&listener)?)
            });
            to_node.add(number, rate(micros(&vm, &format!("probe tcp-send {address} {STREAM}"))?));
            to_guest.add(number, rate(micros(&vm, &format!("probe tcp-receive {address} {STREAM}"))?));
            let times = vm.run(&format!("probe tcp-ping {address} {PINGS}"))?;
            let (average, late) = times.split_once(' ').with_context(|| format!("the probe says {times:?}"))?;
            mean.add(number, average.parse::<f64>()? / 1e3);
            slow.add(number, late.parse::<f64>()? / 1e3);
            node.join().map_err(|_| anyhow::anyhow!("the node's side panicked"))??;
        }
    }
    to_node.say(&sides);
    to_guest.say(&sides);
    mean.say(&sides);
    slow.say(&sides);
    Ok(())
}

fn micros(vm: &Running, command: &str) -> Result<f64> {
    let said = vm.run(command)?;
    said.parse().with_context(|| format!("{command}: the probe says {said:?}"))
}
