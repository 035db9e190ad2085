//! Placement: which slot of which node takes a VM. Filter first (ready and reporting, a free slot, memory), then score:
//! not where it failed before, then where fewest VMs of its tier are, then where most memory is free, then by number.

use std::cmp::Reverse;

use super::Node;
use super::draft::Draft;
use crate::records::{NodeNumber, TierRecord};

/// What one VM takes beside its guest's RAM: the VMM's own pages, its queues, its page tables. The node agent counts the
/// same (`VMM_MIB` in its `host.rs`), and both must agree: it refuses what does not fit by its own count.
pub const VM_OVERHEAD_MIB: u64 = 32;

/// What a node keeps for its kernel, its agent and its page cache; the agent's `RESERVED_MIB`, likewise.
pub const NODE_RESERVE_MIB: u64 = 256;

/// What a node still has for VMs, as drafted.
struct Room {
    slot: Option<u32>,
    slots_free: usize,
    memory_mib: u64,
    of_tier: usize,
}

/// Lower is better.
type Score = (bool, usize, Reverse<u64>, NodeNumber);

struct Best {
    score: Score,
    slot: u32,
    room: Room,
}

/// A choice that was made, in words.
pub(super) struct Choice {
    pub slot: (NodeNumber, u32),
    pub because: String,
}

/// The best slot for a VM called `name` of `tier`, or why there is none. `without` is the index of a held slot that
/// counts as free: the question is then where the VM would go once that one has left.
pub(super) fn choose(
    draft: &Draft<'_>,
    tier: &TierRecord,
    name: &str,
    without: Option<usize>,
) -> Result<Choice, String> {
    let needed = tier.spec.memory_mib.saturating_add(VM_OVERHEAD_MIB);
    let failed_on = draft.failing.get(name).map(|(failure, _)| failure.node);
    let mut refusals = Vec::new();
    let mut best = None;
    for node in &draft.world.nodes {
        let number = node.record.number;
        let Some(room) = room(draft, node, &tier.spec.name, without) else { continue };
        let Some(slot) = room.slot else {
            refusals.push(format!("{number} has no free slot"));
            continue;
        };
        if room.memory_mib < needed {
            refusals.push(format!("{number} has {} of {needed} MiB free", room.memory_mib));
            continue;
        }
        let score = (failed_on == Some(number), room.of_tier, Reverse(room.memory_mib), number);
        if best.as_ref().is_none_or(|best: &Best| score < best.score) {
            best = Some(Best { score, slot, room });
        }
    }
    let Some(Best { score: (.., number), slot, room }) = best else {
        return Err(if refusals.is_empty() { "no node is ready".into() } else { refusals.join(", ") });
    };
    let because = format!(
        "{number} has {} free slots, {} MiB free and {} VMs of this tier",
        room.slots_free, room.memory_mib, room.of_tier
    );
    Ok(Choice { slot: (number, slot), because })
}

/// Room on `node`; none where it is not ready or has not reported yet.
fn room(draft: &Draft<'_>, node: &Node, tier: &str, without: Option<usize>) -> Option<Room> {
    let number = node.record.number;
    let capacity = &node.report.as_ref().filter(|_| draft.ready(number))?.capacity;
    let here: Vec<_> = draft.here(number).filter(|(index, _)| Some(*index) != without).map(|(_, held)| held).collect();
    let mut free = (0..capacity.slots).filter(|slot| here.iter().all(|held| held.slot != *slot));
    let slot = free.next();
    // A VM that this control node knows nothing of sits in one of the slots that look free; which one does not matter.
    let looks_free = usize::from(slot.is_some()) + free.count();
    let slots_free = looks_free.saturating_sub(draft.strangers(number));
    let taken = here
        .iter()
        .fold(NODE_RESERVE_MIB, |sum, held| sum.saturating_add(held.memory_mib).saturating_add(VM_OVERHEAD_MIB));
    Some(Room {
        slot: slot.filter(|_| slots_free > 0),
        slots_free,
        memory_mib: capacity.memory_mib.saturating_sub(taken),
        of_tier: here.iter().filter(|held| held.wanted && held.tier == tier).count(),
    })
}
