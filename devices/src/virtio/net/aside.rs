//! Frames that do not reach the link: those between the guest and its metadata server.

use std::io;

use vmm_sys_util::timerfd::TimerFd;

use super::HEADER_LEN;
use crate::metadata::{HEAD_LEN, Responder};
use crate::virtio::View;

/// A server beside the link, and its timer.
pub(super) struct Aside {
    responder: Responder,
    timer: TimerFd,
    frame: Vec<u8>,
}

impl Aside {
    pub(super) fn open(responder: Responder) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self { responder, timer, frame: Vec::new() })
    }

    pub(super) fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Takes a frame, virtio header included, if it is for the server.
    pub(super) fn take(&mut self, frame: View<'_>) -> bool {
        let mut head = [0; HEADER_LEN + HEAD_LEN];
        let len = frame.copy_to(&mut head);
        if len < head.len() || !self.responder.wants(&head[HEADER_LEN..]) {
            return false;
        }
        self.frame.resize(frame.len(), 0);
        frame.copy_to(&mut self.frame);
        self.responder.take(&self.frame[HEADER_LEN..]);
        self.set_timer();
        true
    }

    /// The next frame for the guest, without a header.
    pub(super) fn frame(&self) -> Option<&[u8]> {
        self.responder.frame()
    }

    /// It was handed over, or never will be.
    pub(super) fn drop_frame(&mut self) {
        self.responder.drop_frame();
    }

    /// The timer has run out.
    pub(super) fn go_on(&mut self) {
        // It is ready, so that this does not wait.
        let _ = self.timer.wait();
        self.responder.work();
        self.set_timer();
    }

    /// A new driver: nothing of the old one's goes on.
    pub(super) fn reset(&mut self) {
        self.responder.reset();
        self.set_timer();
    }

    fn set_timer(&mut self) {
        // Without a timer connections end late, and nothing else is lost.
        let _ = match self.responder.delay() {
            Some(delay) => self.timer.reset(delay, None),
            None => self.timer.clear(),
        };
    }
}
