//! The only place where a plan becomes deeds. One transaction does the whole plan: assignments, generations and the
//! events that explain them. What follows from it outside, handing desired sets to nodes, is level-triggered
//! ([`crate::push`]): after a crash at any point the store says what is left to do.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bedplate_api::VmId;
use bedplate_api::control::NodeState;
use bedplate_api::node::Power;
use tokio_util::sync::CancellationToken;

use crate::control::{Control, now};
use crate::planner::{Action, plan};
use crate::records::{Assignment, Failure, NodeNumber, NodeRecord};
use crate::store::{Change, FAILURES, Read, StoreError, TIERS, VMS};

/// Silence and deadlines are noticed without any event, so a plan is made at least this often.
const TICK: Duration = Duration::from_secs(1);

/// Plans and acts until `stop`.
pub async fn run(control: Arc<Control>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = control.planner_woken() => {}
            () = tokio::time::sleep(TICK) => {}
        }
        if let Err(error) = step(&control).await {
            // Nothing was done. The next tick tries again.
            tracing::error!("a plan could not be carried out: {error}");
        }
    }
}

/// Makes one plan and carries it out; how many actions that were.
pub async fn step(control: &Arc<Control>) -> Result<usize, StoreError> {
    // A quarter of the limit: with a report of each node in every fifth of it, none comes near the limit unnoticed.
    let late = TICK + Duration::from_secs(control.options.lost_after) / 4;
    if control.observed.stalled(Instant::now(), late) {
        let words = "this control node did not run for a while: nothing is concluded from the nodes' silence meanwhile";
        control.event("control", words).await;
        return Ok(0);
    }
    let shared = Arc::clone(control);
    let idle = control.read(move |snapshot| Ok(plan(&shared.world(snapshot)?).actions.is_empty())).await?;
    if idle {
        return Ok(0);
    }
    let shared = Arc::clone(control);
    // Planned again inside the transaction: between the look above and here the world may have moved.
    let done = control
        .change(move |change| {
            // The process may have been stopped since the look above.
            if shared.observed.stalled(Instant::now(), late) {
                return Ok(0);
            }
            let plan = plan(&shared.world(change)?);
            let mut deeds = Deeds { change, now: now(), nodes: BTreeMap::new() };
            for (action, reason) in &plan.actions {
                deeds.act(action, reason)?;
            }
            deeds.finish()?;
            Ok::<_, StoreError>(plan.actions.len())
        })
        .await?;
    control.wake_pushes();
    Ok(done)
}

/// A plan being carried out within one transaction.
struct Deeds<'c> {
    change: &'c Change,
    now: u64,
    /// Nodes touched so far.
    nodes: BTreeMap<NodeNumber, Touched>,
}

struct Touched {
    record: NodeRecord,
    /// Its desired set changes, so its generation grows: once, however many actions touch it.
    generation: Option<u64>,
}

impl Deeds<'_> {
    fn act(&mut self, action: &Action, reason: &str) -> Result<(), StoreError> {
        match action {
            Action::Lose(node) => self.node(*node)?.record.state = NodeState::Lost,
            Action::GiveUpBoot(node) => {
                let record = &mut self.node(*node)?.record;
                record.state = if record.id.is_some() { NodeState::Lost } else { NodeState::Blank };
                record.booting_since = None;
            }
            Action::Renumber { node, reported } => {
                self.node(*node)?.record.generation = *reported;
                self.next_generation(*node)?;
            }
            Action::Release { vm, .. } => drop(self.change.remove_vm(*vm)?),
            Action::Leave { vm, failed, .. } => self.leave(*vm, failed.as_deref())?,
            Action::Settle { vm, .. } => self.settle(*vm)?,
            Action::SetPower { vm, power, .. } => self.set_power(*vm, *power)?,
            Action::Place { tier, name, node, slot } => self.place(tier, name, *node, *slot)?,
            Action::Forgive { name } => drop(self.change.remove(&FAILURES, name)?),
        }
        self.change.event(self.now, action.subject(), format!("{action}: {reason}"))
    }

    fn node(&mut self, number: NodeNumber) -> Result<&mut Touched, StoreError> {
        let touched = match self.nodes.remove(&number) {
            Some(touched) => touched,
            // Plans name only nodes of the world that they were made from, and nothing removes one within a transaction.
            None => Touched {
                record: self.change.node(number)?.unwrap_or_else(|| NodeRecord::new(number)),
                generation: None,
            },
        };
        Ok(self.nodes.entry(number).or_insert(touched))
    }

    fn next_generation(&mut self, number: NodeNumber) -> Result<u64, StoreError> {
        let touched = self.node(number)?;
        let base = touched.record.generation;
        Ok(*touched.generation.get_or_insert(base.saturating_add(1)))
    }

    fn place(&mut self, tier: &str, name: &str, node: NodeNumber, slot: u32) -> Result<(), StoreError> {
        let Some(record) = self.change.one(&TIERS, tier)? else { return Ok(()) };
        self.next_generation(node)?;
        let vm = record.vm(VmId::random(), name.to_owned());
        self.change.put_vm(&Assignment { vm, tier: tier.to_owned(), node, slot, left_at: None, has_run: false })
    }

    fn leave(&mut self, vm: VmId, failed: Option<&str>) -> Result<(), StoreError> {
        let Some(mut assignment) = self.change.one(&VMS, &vm.to_string())? else { return Ok(()) };
        assignment.left_at = Some(self.next_generation(assignment.node)?);
        if let Some(reason) = failed {
            let name = assignment.vm.name.clone();
            let before = self.change.one(&FAILURES, &name)?.map_or(0, |f: Failure| f.count);
            let failure = Failure {
                name,
                tier: assignment.tier.clone(),
                count: before.saturating_add(1),
                at: self.now,
                node: assignment.node,
                reason: reason.to_owned(),
            };
            self.change.put(&FAILURES, &failure.name, &failure)?;
        }
        self.change.put_vm(&assignment)
    }

    fn settle(&mut self, vm: VmId) -> Result<(), StoreError> {
        let Some(mut assignment) = self.change.one(&VMS, &vm.to_string())? else { return Ok(()) };
        assignment.has_run = true;
        self.change.put_vm(&assignment)
    }

    fn set_power(&mut self, vm: VmId, power: Power) -> Result<(), StoreError> {
        let Some(mut assignment) = self.change.one(&VMS, &vm.to_string())? else { return Ok(()) };
        assignment.vm.power = power;
        self.next_generation(assignment.node)?;
        self.change.put_vm(&assignment)
    }

    fn finish(self) -> Result<(), StoreError> {
        for Touched { mut record, generation } in self.nodes.into_values() {
            record.generation = generation.unwrap_or(record.generation);
            self.change.put_node(&record)?;
        }
        Ok(())
    }
}
