//! One image's copy, beside the agent's task: attempts until it is here whole or cannot be had.

use bedplate_api::Digest;
use bedplate_api::image::Manifest;
use bedplate_api::node::CopyProgress;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, sleep};

use super::Event;
use crate::image::{ImageError, Images, Sweep};

/// The first wait between two attempts, and the least.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait between two attempts.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// What one copy works with.
pub(super) struct Attempts {
    pub images: Images,
    pub digest: Digest,
    /// Of this copy: it stands in its events.
    pub number: u64,
    /// Images that must not be removed to make room.
    pub keep: Vec<Digest>,
    pub progress: watch::Sender<Option<CopyProgress>>,
    pub trouble: watch::Sender<Option<String>>,
    pub events: mpsc::Sender<Event>,
}

impl Attempts {
    /// Copies. What there is to tell meanwhile, and how it ended, are events.
    pub(super) async fn run(self) {
        let result = tokio::select! {
            result = self.attempts() => result,
            () = self.tell() => Err(ImageError::Aborted),
        };
        if result.as_ref().is_err_and(ImageError::is_no_space) {
            make_room(&self.images, self.keep.clone(), Sweep::Unused, &self.events).await;
        }
        let _ended = self.events.send(Event::Image(self.digest, self.number, result.map_err(|e| e.to_string()))).await;
    }

    async fn attempts(&self) -> Result<(), ImageError> {
        let manifest = self.begin().await?;
        let mut wait = FIRST_WAIT;
        // VMs run from it now and guests may wait: nothing is given up any more. An image that was removed from the
        // repository may come back, and space may be freed.
        while let Err(e) = self.images.finish(self.digest, &manifest, &self.progress).await {
            if e.is_no_space() {
                let keep = self.keep.iter().copied().chain([self.digest]).collect();
                make_room(&self.images, keep, Sweep::Unused, &self.events).await;
            }
            self.pause(&e, &mut wait).await;
        }
        Ok(())
    }

    /// Until VMs can be started, or cannot be.
    async fn begin(&self) -> Result<Manifest, ImageError> {
        let mut wait = FIRST_WAIT;
        loop {
            match self.images.begin(self.digest, &self.progress).await {
                Ok((bootable, manifest)) => {
                    self.trouble.send_replace(None);
                    let _ended = self.events.send(Event::Bootable(self.digest, self.number, bootable)).await;
                    return Ok(manifest);
                }
                Err(e) if e.is_final() => return Err(e),
                Err(e) => self.pause(&e, &mut wait).await,
            }
        }
    }

    /// Says what went wrong and waits, longer each time.
    async fn pause(&self, error: &ImageError, wait: &mut Duration) {
        let said = format!("{error}; the next try is in {} s", wait.as_secs());
        tracing::warn!("image {}: {said}", self.digest.short());
        self.trouble.send_replace(Some(said));
        sleep(FIRST_WAIT).await;
        tokio::select! {
            () = sleep(wait.saturating_sub(FIRST_WAIT)) => {}
            () = self.images.source_answers() => {}
        }
        *wait = (*wait * 2).min(MAX_WAIT);
    }

    /// Tells the agent, and through it people, how it goes.
    async fn tell(&self) {
        let (mut progress, mut trouble) = (self.progress.subscribe(), self.trouble.subscribe());
        let mut guests = self.images.guests_held_up();
        let mut seen = None;
        loop {
            tokio::select! {
                Ok(()) = progress.changed() => {
                    let done = progress.borrow_and_update().map(|progress| progress.done);
                    // Something has come: whatever held it up does so no longer.
                    if seen.is_some() && done > seen {
                        self.trouble.send_if_modified(|trouble| trouble.take().is_some());
                    }
                    seen = seen.max(done);
                }
                Ok(()) = trouble.changed() => {}
                Some((image, why)) = held_up(&mut guests) => {
                    if image == self.digest {
                        self.trouble.send_replace(why);
                    }
                    continue;
                }
                else => return,
            }
            let _ended = self.events.send(Event::Progress).await;
            // Progress is for people.
            sleep(Duration::from_millis(250)).await;
        }
    }
}

/// What guests wait for next, if there is anybody to get it from.
async fn held_up(guests: &mut Option<watch::Receiver<(Digest, Option<String>)>>) -> Option<(Digest, Option<String>)> {
    let guests = guests.as_mut()?;
    guests.changed().await.ok()?;
    Some(guests.borrow_and_update().clone())
}

/// Removes what is not needed, so that the next copy finds room.
pub(super) async fn make_room(images: &Images, keep: Vec<Digest>, sweep: Sweep, events: &mpsc::Sender<Event>) {
    if let Err(e) = images.make_room(keep, sweep).await {
        tracing::warn!("no room could be made for images: {e}");
    }
    let _ended = events.send(Event::Swept).await;
}
