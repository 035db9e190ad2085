//! What a figure was measured on.

use std::fs::read_to_string;

/// Prints the machine, once per run, above all figures.
pub fn describe_machine() {
    let line = |path: &str| read_to_string(path).unwrap_or_default();
    let first = |path: &str| line(path).lines().next().unwrap_or("unknown").trim().to_owned();
    let cpuinfo = line("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let hypervisor = cpuinfo.lines().any(|line| line.starts_with("flags") && line.contains(" hypervisor"));
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    println!(
        "machine: {}, {processors} processors{}, Linux {}, load {}",
        model.trim_start_matches([' ', '\t', ':']),
        if hypervisor { " of a VM" } else { "" },
        first("/proc/sys/kernel/osrelease"),
        first("/proc/loadavg"),
    );
    println!(
        "clock: the host's CLOCK_MONOTONIC, from {}",
        first("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    );
}
