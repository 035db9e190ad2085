//! `bedplate vm inspect`, for people.

use bedplate_api::vmm::{ExitRecord, Inspection, QueueInspection, Registers, VcpuInspection};
use comfy_table::Cell;

use crate::output::{self, Format, PrintError};

/// Exits that are shown of those that are kept; `-o json` has all.
const SHOWN: usize = 6;

/// Prints `seen` of the VM called `name`.
pub(super) fn print(name: &str, seen: &Inspection) -> Result<(), PrintError> {
    output::line(&format!("{name}: {}", output::word(&seen.state)))?;
    for vcpu in &seen.vcpus {
        output::line(&text(vcpu))?;
    }
    let queues: Vec<_> =
        seen.queues.iter().flat_map(|(device, queues)| queues.iter().map(move |queue| (device, queue))).collect();
    output::line("")?;
    let header = ["DEVICE", "QUEUE", "SIZE", "MADE AVAILABLE", "USED", "OUTSTANDING"];
    output::list(Format::Table, &queues, "The guest's drivers have enabled no virtqueue.", &header, row)
}

fn text(vcpu: &VcpuInspection) -> String {
    let counts = serde_json::to_value(vcpu.exits).unwrap_or_default();
    let counts: Vec<_> = counts.as_object().into_iter().flatten().map(|(kind, n)| format!("{kind} {n}")).collect();
    let last: Vec<_> = vcpu.last_exits.iter().take(SHOWN).map(exit).collect();
    let registers = vcpu.registers.as_ref().map_or("registers: it did not leave the guest in time".into(), registers);
    format!(
        "\nvCPU {}\n  {registers}\n  exits  {}\n  last   {}",
        vcpu.index,
        counts.join(", "),
        if last.is_empty() { "-".into() } else { last.join(", ") }
    )
}

fn registers(r: &Registers) -> String {
    let rows = [
        [("rip", r.rip), ("flg", r.rflags), ("rsp", r.rsp), ("rbp", r.rbp)],
        [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
        [("rsi", r.rsi), ("rdi", r.rdi), ("r8 ", r.r8), ("r9 ", r.r9)],
        [("r10", r.r10), ("r11", r.r11), ("r12", r.r12), ("r13", r.r13)],
        [("r14", r.r14), ("r15", r.r15), ("fs ", r.fs_base), ("gs ", r.gs_base)],
        [("cr0", r.cr0), ("cr2", r.cr2), ("cr3", r.cr3), ("cr4", r.cr4)],
    ];
    let row = |row: &[(&str, u64); 4]| row.map(|(name, value)| format!("{name} {value:016x}")).join("  ");
    let rows: Vec<_> = rows.iter().map(row).collect();
    format!("{}\n  cs {:04x}  ss {:04x}  efer {:x}", rows.join("\n  "), r.cs, r.ss, r.efer)
}

fn exit(exit: &ExitRecord) -> String {
    let kind = output::word(&exit.kind);
    match (exit.address, exit.len) {
        (Some(address), Some(len)) => format!("{kind} {address:#x}/{len}"),
        _ => kind,
    }
}

/// A name that a VMM gave, which its guest may have taken over.
fn printable(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).collect()
}

fn row((device, queue): &(&String, &QueueInspection)) -> Vec<Cell> {
    vec![
        Cell::new(printable(device)),
        Cell::new(queue.index),
        Cell::new(queue.size),
        Cell::new(output::or_dash(queue.available)),
        Cell::new(output::or_dash(queue.used)),
        Cell::new(output::or_dash(queue.outstanding)),
    ]
}
