//! Which system calls the threads of VMMs make: what the sandbox's lists are held against.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

const TRACING: &str = "/sys/kernel/tracing";
const EVENT: &str = "/sys/kernel/tracing/events/raw_syscalls/sys_enter";
/// Of kinds of calls and threads, more than there are.
const ROOM: u32 = 1 << 15;

/// Has the node's kernel count calls from now on.
pub(super) fn count() -> Result<()> {
    mount("tracefs", TRACING, "tracefs", MountFlags::empty(), None).with_context(|| format!("mount {TRACING}"))?;
    let trigger = format!("hist:keys=id.syscall,common_pid.execname:size={ROOM}");
    fs::write(Path::new(EVENT).join("trigger"), trigger).context("count system calls")
}

/// A line for each name of a thread: the calls that threads of that name have made.
pub(super) fn counted() -> Result<Vec<String>> {
    let text = fs::read_to_string(Path::new(EVENT).join("hist")).context("read the counts of system calls")?;
    let mut calls: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    // `{ id: sys_read                      [  0], common_pid: vcpu0           [        81] } hitcount:         12`
    for line in text.lines().filter_map(|line| line.strip_prefix("{ id: ")) {
        let (call, rest) = line.split_once('[').with_context(|| format!("{line:?} is no count"))?;
        let thread = rest.split_once("common_pid: ").and_then(|(_, rest)| rest.split_once(" ["));
        let (thread, _) = thread.with_context(|| format!("{line:?} is no count"))?;
        calls.entry(thread.trim()).or_default().insert(call.trim().trim_start_matches("sys_"));
    }
    let line = |(thread, calls): (&str, BTreeSet<&str>)| {
        format!("calls of {thread}: {}", calls.into_iter().collect::<Vec<_>>().join(" "))
    };
    Ok(calls.into_iter().map(line).collect())
}
