//! The work of a balloon: pages that the driver names are given back to the host.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event_manager::EventSet;
use vm_memory::GuestAddress;

use super::{BalloonControl, BalloonMetrics, DONE, F_HINTING, F_REPORTING, F_STATS, PAGE, QUEUES, STOP, Shared};
use crate::metrics::DeviceMetrics;
use crate::virtio::timer::Timer;
use crate::virtio::{Answer, Buffers, Chain, Handler, Inbox, Session, View};

/// Page numbers of one chain, at most. Linux sends 256.
const MAX_PAGES: usize = 4096;
/// The worker's descriptors: orders from the control thread, the time for the next report.
const ORDERS: u32 = 0;
const REPORT: u32 = 1;

/// What the control thread asks for.
#[derive(Default)]
pub(super) struct Orders {
    /// The driver has to look at the configuration space.
    pub(super) tell: bool,
    /// Reports come in another interval.
    pub(super) interval: bool,
    pub(super) hinting: Option<Hinting>,
}

/// About runs of hinting.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hinting {
    Start { acknowledge: bool },
    Stop,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hinting,
    Reporting,
}

pub(super) struct BalloonHandler {
    shared: Arc<Shared>,
    inbox: Arc<Inbox<Orders>>,
    counts: Arc<BalloonMetrics>,
    timer: Timer,
    /// The last run of hinting, and whether its end is to be acknowledged at once.
    run: u32,
    acknowledge: bool,
    /// The driver has just said that it has told of all.
    stopped: bool,

    roles: [Option<Role>; QUEUES],
    /// The buffer of the statistics, which is returned to ask for new ones.
    held: Option<(usize, u16)>,
    /// Page numbers of a chain, and the ranges that they make.
    numbers: Vec<u32>,
    ranges: Option<Buffers>,
}

impl BalloonHandler {
    pub(super) fn open(control: &BalloonControl, counts: &Arc<BalloonMetrics>) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::clone(&control.shared),
            inbox: Arc::clone(&control.inbox),
            counts: Arc::clone(counts),
            timer: Timer::open()?,
            run: DONE,
            acknowledge: true,
            stopped: false,
            roles: [None; QUEUES],
            held: None,
            numbers: Vec::with_capacity(MAX_PAGES),
            ranges: None,
        })
    }

    /// Finds the queues' roles: those in use have them in order, whatever gaps are between.
    fn assign(&mut self, session: &Session<'_, '_>) {
        let has = |bit: u64| session.features & bit != 0;
        let mut roles = [
            (true, Role::Inflate),
            (true, Role::Deflate),
            (has(F_STATS), Role::Stats),
            (has(F_HINTING), Role::Hinting),
            (has(F_REPORTING), Role::Reporting),
        ]
        .into_iter()
        .filter_map(|(negotiated, role)| negotiated.then_some(role));
        self.roles = [None; QUEUES];
        for (place, queue) in self.roles.iter_mut().zip(session.queues.iter()) {
            *place = queue.as_ref().and_then(|_| roles.next());
        }
    }

    /// Gives back the pages whose numbers are in a chain.
    fn inflate(&mut self, chain: &Chain, metrics: &DeviceMetrics) {
        let list = chain.readable.view();
        self.numbers.clear();
        let mut rest = list;
        while self.numbers.len() < MAX_PAGES
            && let Some((number, after)) = rest.split_value::<u32>()
        {
            self.numbers.push(u32::from_le(number));
            rest = after;
        }
        if list.is_empty() || !rest.is_empty() {
            metrics.guest_faults.increment();
        }
        self.counts.inflated.add(self.numbers.len() as u64);
        // Neighbours go with one call.
        self.numbers.sort_unstable();
        let Some(mut ranges) = self.ranges.take() else { return };
        ranges.clear();
        for run in self.numbers.chunk_by(|a, b| b - a <= 1) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let address = GuestAddress(u64::from(*first) * PAGE);
            let len = u32::try_from((u64::from(last - first) + 1) * PAGE);
            if len.map_or(true, |len| ranges.push(address, len).is_err()) {
                metrics.guest_faults.increment();
            }
        }
        self.release(ranges.view(), metrics);
        self.ranges = Some(ranges);
    }

    fn release(&self, pages: View<'_>, metrics: &DeviceMetrics) -> u64 {
        match pages.release() {
            Ok(bytes) => {
                self.counts.released_bytes.add(bytes);
                bytes
            }
            Err(error) => {
                metrics.host_fault(|| format!("cannot give back memory of a guest: {error}"));
                0
            }
        }
    }

    /// Free pages, or the driver's word about the run that they belong to.
    fn hint(&mut self, chain: &Chain, session_metrics: &DeviceMetrics) {
        let shared = Arc::clone(&self.shared);
        if let Some((command, rest)) = chain.readable.view().split_value::<u32>() {
            if !rest.is_empty() {
                session_metrics.guest_faults.increment();
            }
            let command = u32::from_le(command);
            shared.guest_command.store(command, Ordering::SeqCst);
            self.stopped = command == STOP;
        }
        let host = shared.host_command.load(Ordering::SeqCst);
        // Hints of a run that is over may be in use again.
        if host > DONE && shared.guest_command.load(Ordering::SeqCst) == host {
            let bytes = self.release(chain.writable.view(), session_metrics);
            self.counts.hinted_bytes.add(bytes);
        }
    }

    fn serve(&mut self, role: Role, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        if chain.fault.is_none() {
            match role {
                Role::Inflate => self.inflate(chain, metrics),
                // Pages come back when they are touched.
                Role::Deflate => self.counts.deflated.add((chain.readable.len() / size_of::<u32>()) as u64),
                Role::Hinting => self.hint(chain, metrics),
                Role::Reporting => {
                    let bytes = self.release(chain.writable.view(), metrics);
                    self.counts.reported_bytes.add(bytes);
                }
                Role::Stats => {}
            }
        }
        Answer::Used(0)
    }

    /// Takes a report and keeps its buffer, which is how the next one is asked for. A driver has one buffer; of one that
    /// sends more, the last is kept.
    fn take_report(&mut self, index: usize, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        let (shared, counts, held) = (&self.shared, &self.counts, &mut self.held);
        let Some(queue) = session.queue(index) else { return };
        let mut before = held.take();
        queue.drain(|chain| {
            if chain.fault.is_none() {
                if !shared.stats.update(chain.readable.view()) {
                    metrics.guest_faults.increment();
                }
                // Last: who sees the count finds the report.
                counts.stats_updates.increment();
            }
            if held.is_some() {
                return Answer::Used(0);
            }
            *held = Some((index, chain.head));
            Answer::Later
        });
        if held.is_none() {
            *held = before.take();
        }
        if let Some((_, head)) = before {
            queue.push(head, 0);
            queue.announce();
        }
    }

    /// Returns the buffer of the last report.
    fn give_back(&mut self, session: &mut Session<'_, '_>) {
        if let Some((index, head)) = self.held.take()
            && let Some(queue) = session.queue(index)
        {
            queue.push(head, 0);
            queue.announce();
        }
    }

    fn set_timer(&self, features: u64) {
        let seconds = if features & F_STATS != 0 { self.shared.stats_interval.load(Ordering::SeqCst) } else { 0 };
        self.timer.every(Duration::from_secs(seconds.into()));
    }

    fn follow_orders(&mut self, session: &mut Session<'_, '_>) {
        let Orders { mut tell, interval, hinting } = self.inbox.take();
        if interval {
            self.set_timer(session.features);
        }
        match hinting {
            Some(Hinting::Start { acknowledge }) => {
                // Numbers below are commands.
                self.run = self.run.checked_add(1).unwrap_or(DONE + 1);
                self.acknowledge = acknowledge;
                self.shared.host_command.store(self.run, Ordering::SeqCst);
                tell = true;
            }
            Some(Hinting::Stop) => {
                self.shared.host_command.store(DONE, Ordering::SeqCst);
                tell = true;
            }
            None => {}
        }
        if tell {
            session.interrupt.config_changed();
        }
    }

    /// The driver has nothing more to say in this run: it gets its pages back.
    fn end_run(&mut self, session: &Session<'_, '_>) {
        let (stopped, shared) = (std::mem::take(&mut self.stopped), &self.shared);
        if self.acknowledge
            && stopped
            && shared.host_command.load(Ordering::SeqCst) > DONE
            && shared.host_command.swap(DONE, Ordering::SeqCst) != DONE
        {
            session.interrupt.config_changed();
        }
    }
}

impl Handler for BalloonHandler {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        (self.held, self.stopped) = (None, false);
        self.assign(session);
        self.ranges = session.queues.iter().flatten().next().map(|queue| Buffers::new(Arc::clone(queue.memory())));
        // A driver begins without a balloon and without a run.
        self.shared.host_command.store(STOP, Ordering::SeqCst);
        self.shared.guest_command.store(STOP, Ordering::SeqCst);
        for (fd, token) in [(self.inbox.as_raw_fd(), ORDERS), (self.timer.as_raw_fd(), REPORT)] {
            if let Err(error) = session.watch(&fd, token, EventSet::IN) {
                session.metrics.host_fault(|| format!("cannot watch a balloon's events: {error}"));
            }
        }
        self.set_timer(session.features);
    }

    fn notified(&mut self, index: usize, session: &mut Session<'_, '_>) {
        match self.roles.get(index) {
            Some(Some(Role::Stats)) => self.take_report(index, session),
            Some(&Some(role)) => {
                let metrics = session.metrics;
                if let Some(queue) = session.queue(index) {
                    queue.drain(|chain| self.serve(role, chain, metrics));
                }
                if role == Role::Hinting {
                    self.end_run(session);
                }
            }
            _ => {}
        }
    }

    fn ready(&mut self, token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        match token {
            ORDERS => self.follow_orders(session),
            _ => {
                self.timer.expired();
                self.give_back(session);
            }
        }
    }

    fn stopping(&mut self, session: &mut Session<'_, '_>) {
        self.timer.every(Duration::ZERO);
        self.give_back(session);
        // The next driver starts anew.
        self.shared.actual.store(0, Ordering::SeqCst);
    }
}
