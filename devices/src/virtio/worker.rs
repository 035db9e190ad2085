//! The thread on which a device works: started when the driver is ready, joined when the device is reset.
//!
//! The device's [`Handler`] moves to the thread and back, so that it is never shared. One epoll, through
//! `event-manager`, waits for the driver's notifications, for the host descriptors that the handler watches, and for the
//! order to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Active, Interrupt, Virtqueue};
use crate::metrics::DeviceMetrics;
use crate::threads;

/// Tags of events: queues by number, then the order to stop, then the handler's own.
const STOP: u32 = 1 << 16;
const HOST: u32 = STOP + 1;

/// Largest token of a handler's own descriptors.
pub const MAX_TOKEN: u32 = u32::MAX - HOST;

/// The work of a device. All calls come from its worker thread, one at a time.
pub trait Handler: Send + 'static {
    /// The driver is ready: forget what belongs to an earlier session, watch descriptors. Comes first, once per start;
    /// [`Handler::notified`] follows for every queue.
    fn started(&mut self, _session: &mut Session<'_, '_>) {}

    /// There may be new chains in queue `queue`.
    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>);

    /// A watched descriptor is ready.
    fn ready(&mut self, _token: u32, _events: EventSet, _session: &mut Session<'_, '_>) {}

    /// The device is being stopped: give back chains in hand, so that nothing is in flight. Comes last.
    fn stopping(&mut self, _session: &mut Session<'_, '_>) {}
}

/// What a handler works with while it runs.
pub struct Session<'a, 'b> {
    /// By number; `None` for those that the driver has not enabled.
    pub queues: &'a mut [Option<Virtqueue>],
    /// Negotiated feature bits.
    pub features: u64,
    /// The device's counters.
    pub metrics: &'a DeviceMetrics,
    /// To the driver, for what concerns no queue.
    pub interrupt: &'a dyn Interrupt,
    ops: &'a mut EventOps<'b>,
}

impl Session<'_, '_> {
    /// The queue, if the driver has enabled it and it still works.
    pub fn queue(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.queues.get_mut(index)?.as_mut().filter(|queue| !queue.is_broken())
    }

    /// Has [`Handler::ready`] called with `token` while `events` are there (level-triggered). The descriptor must be
    /// unwatched before it is closed.
    ///
    /// # Errors
    /// The host has no room for it.
    pub fn watch(&mut self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        debug_assert!(token <= MAX_TOKEN);
        self.ops.add(Events::with_data(fd, HOST + token, events)).map_err(io::Error::other)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// The descriptor is not watched.
    pub fn rewatch(&mut self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.ops.modify(Events::with_data(fd, HOST + token, events)).map_err(io::Error::other)
    }

    /// Waits for it no longer.
    pub fn unwatch(&mut self, fd: &impl AsRawFd) {
        // Fails only for one that is not watched.
        let _ = self.ops.remove(Events::empty(fd));
    }
}

/// A device's handler: at rest here, or at work on its thread.
pub struct Worker<H> {
    name: String,
    metrics: Arc<DeviceMetrics>,
    state: State<H>,
}

enum State<H> {
    Idle(H),
    Running {
        stop: EventFd,
        thread: JoinHandle<Option<Runner<H>>>,
    },
    /// The thread has panicked and took the handler along.
    Lost,
}

impl<H: Handler> Worker<H> {
    /// A handler at rest; `name` is for its thread.
    pub fn new(name: impl Into<String>, handler: H, metrics: Arc<DeviceMetrics>) -> Self {
        Self { name: name.into(), metrics, state: State::Idle(handler) }
    }

    /// The handler, while it is at rest.
    pub fn handler(&mut self) -> Option<&mut H> {
        if let State::Idle(handler) = &mut self.state { Some(handler) } else { None }
    }

    /// The device's counters.
    pub fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no thread or descriptors left, or the device is running already; the handler stays as it was.
    pub fn start(&mut self, active: Active) -> io::Result<()> {
        if !matches!(self.state, State::Idle(_)) {
            return Err(io::Error::other("the device is running already, or its worker has died"));
        }
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let their_stop = stop.try_clone()?;
        let manager = EventManager::new().map_err(io::Error::other)?;
        // The handler follows through a channel: it must not be lost if there is no thread for it.
        let (sender, receiver) = mpsc::sync_channel::<Runner<H>>(1);
        let body = move || receiver.recv().ok().map(|runner| run(manager, runner));
        let thread = threads::worker(self.name.as_str(), body)?;
        if let State::Idle(handler) = std::mem::replace(&mut self.state, State::Running { stop, thread }) {
            let metrics = Arc::clone(&self.metrics);
            // The thread waits for just this, so that it cannot be gone.
            let _ = sender.send(Runner { handler, active, metrics, stop: their_stop, stopped: false });
        }
        Ok(())
    }

    /// Stops and joins the thread. Returns the queues, in which nothing is in flight; none if it was at rest.
    pub fn stop(&mut self) -> Vec<Virtqueue> {
        let (stop, thread) = match std::mem::replace(&mut self.state, State::Lost) {
            State::Running { stop, thread } => (stop, thread),
            other => {
                self.state = other;
                return Vec::new();
            }
        };
        // Fails only if it is signalled already.
        let _ = stop.write(1);
        match thread.join() {
            Ok(Some(runner)) => {
                self.state = State::Idle(runner.handler);
                runner.active.queues.into_iter().flatten().collect()
            }
            _ => {
                self.metrics.host_fault(|| format!("worker {} has died", self.name));
                Vec::new()
            }
        }
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        if let State::Running { stop, thread } = std::mem::replace(&mut self.state, State::Lost) {
            let _ = stop.write(1);
            let _ = thread.join();
        }
    }
}

/// What lives on the thread.
struct Runner<H> {
    handler: H,
    active: Active,
    metrics: Arc<DeviceMetrics>,
    stop: EventFd,
    stopped: bool,
}

fn run<H: Handler>(mut manager: EventManager<Runner<H>>, runner: Runner<H>) -> Runner<H> {
    let metrics = Arc::clone(&runner.metrics);
    let id = manager.add_subscriber(runner);
    loop {
        if let Err(error) = manager.run() {
            metrics.host_fault(|| format!("cannot wait for events: {error}"));
            break;
        }
        if manager.subscriber_mut(id).map_or(true, |runner| runner.stopped) {
            break;
        }
    }
    match manager.remove_subscriber(id) {
        Ok(runner) => runner,
        Err(_) => unreachable!("the only subscriber is removed here and nowhere else"),
    }
}

impl<H: Handler> Runner<H> {
    fn with_session(&mut self, ops: &mut EventOps<'_>, call: impl FnOnce(&mut H, &mut Session<'_, '_>)) {
        let Active { queues, features, interrupt } = &mut self.active;
        let mut session = Session { queues, features: *features, metrics: &self.metrics, interrupt: &**interrupt, ops };
        call(&mut self.handler, &mut session);
    }

    fn watch_own(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(&self.stop, STOP, EventSet::IN))?;
        for queue in self.active.queues.iter().flatten() {
            // Edges, because that spares reading the descriptor each time: every notification is one, whatever it counts.
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data(&**queue.notify(), u32::from(queue.index()), edges))?;
        }
        Ok(())
    }
}

impl<H: Handler> MutEventSubscriber for Runner<H> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.watch_own(ops) {
            self.metrics.host_fault(|| format!("cannot watch a device's event descriptors: {error}"));
        }
        let count = self.active.queues.len();
        self.with_session(ops, |handler, session| {
            handler.started(session);
            // What the driver offered before there was anybody to be notified.
            (0..count).for_each(|queue| handler.notified(queue, session));
        });
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            STOP => {
                self.stopped = true;
                self.with_session(ops, |handler, session| handler.stopping(session));
            }
            // After the stop nothing may be taken from a queue any more.
            _ if self.stopped => {}
            tag if tag < STOP => {
                self.metrics.notifications.increment();
                self.with_session(ops, |handler, session| handler.notified(tag as usize, session));
            }
            tag => self.with_session(ops, |handler, session| handler.ready(tag - HOST, events.event_set(), session)),
        }
    }
}
