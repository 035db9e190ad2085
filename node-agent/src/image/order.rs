//! In which order a boot reads an image: recorded from boots here, kept with the image here and on the control node.

use std::collections::HashSet;

use bedplate_api::Digest;
use bedplate_api::image::{BootOrder, MAX_BOOT_ORDER};

use super::fetch::Urgency;
use super::{DISK_PART, ImageError, Images, blocking};

/// What one boot has read so far.
#[derive(Debug, Default)]
pub(super) struct Recording {
    order: Vec<u64>,
    seen: HashSet<u64>,
}

impl Recording {
    /// The guest has read chunk `number`.
    pub(super) fn add(&mut self, number: u64) {
        if self.order.len() < MAX_BOOT_ORDER && self.seen.insert(number) {
            self.order.push(number);
        }
    }
}

/// The order to keep after a boot that read `recorded`, when `known` was kept before; none if that teaches nothing. What
/// another boot read, and this one did not, stays at the end: guests differ.
fn learn(recorded: &Recording, known: &[u64]) -> Option<Vec<u64>> {
    let known_set: HashSet<u64> = known.iter().copied().collect();
    let new = recorded.order.iter().filter(|number| !known_set.contains(number)).count();
    // Boots differ a little each time, and every change is told to the control node.
    if recorded.order.is_empty() || new * 8 <= recorded.order.len() {
        return None;
    }
    let rest = known.iter().copied().filter(|number| !recorded.seen.contains(number));
    Some(recorded.order.iter().copied().chain(rest).take(MAX_BOOT_ORDER).collect())
}

impl Images {
    /// The chunks that a boot of `image` reads, in its order: as the control node knows it, else as boots here taught it.
    pub(super) async fn boot_order(&self, image: Digest) -> Result<Vec<Digest>, ImageError> {
        let asked = match &self.fetcher {
            // A control node that is away, or of an earlier version, is no reason to wait: it is a hint.
            Some(fetcher) => fetcher.source_for(Urgency::Copy).boot_order(&image).await.unwrap_or_default().chunks,
            None => Vec::new(),
        };
        let store = self.store.clone();
        blocking(move || {
            if !asked.is_empty() {
                // Nothing depends on it.
                if let Err(e) = store.put_boot_order(&image, &asked) {
                    tracing::info!("image {}: the order of its boots is not kept: {e}", image.short());
                }
            }
            let part = store.part(&image, DISK_PART)?;
            let order = store.boot_order(&image)?.into_iter().map(|number| part.digest(number));
            Ok(order.collect::<Result<Vec<_>, _>>()?)
        })
        .await
    }

    /// Keeps what a boot of `image` read, and tells the control node.
    pub(super) async fn learned(&self, image: Digest, recorded: Recording) -> Result<(), ImageError> {
        let store = self.store.clone();
        let kept = blocking(move || {
            let order = learn(&recorded, &store.boot_order(&image)?);
            if let Some(order) = &order {
                store.put_boot_order(&image, order)?;
            }
            Ok(order)
        });
        if let (Some(chunks), Some(fetcher)) = (kept.await?, &self.fetcher) {
            tracing::info!("image {}: a boot reads {} chunks of its disk", image.short(), chunks.len());
            fetcher.source().put_boot_order(&image, &BootOrder { chunks }).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording(numbers: &[u64]) -> Recording {
        let mut recording = Recording::default();
        numbers.iter().for_each(|number| recording.add(*number));
        recording
    }

    #[test]
    fn a_boot_teaches_its_order_unless_that_was_known() {
        assert_eq!(learn(&recording(&[]), &[]), None);
        assert_eq!(learn(&recording(&[5, 2, 5, 9]), &[]).unwrap(), [5, 2, 9]);
        assert_eq!(learn(&recording(&[5, 2]), &[2, 5, 7]), None);
        assert_eq!(learn(&recording(&[5, 2, 9]), &[7, 2]).unwrap(), [5, 2, 9, 7]);
    }

    #[test]
    fn a_guest_that_reads_everything_teaches_a_bounded_order() {
        let all: Vec<u64> = (0..2 * MAX_BOOT_ORDER as u64).collect();
        let recording = recording(&all);
        assert_eq!(recording.seen.len(), MAX_BOOT_ORDER);
        assert_eq!(learn(&recording, &[1 << 40]).unwrap().len(), MAX_BOOT_ORDER);
    }
}
