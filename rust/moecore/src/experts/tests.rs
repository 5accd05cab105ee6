use std::time::SystemTime;

use super::{ExpertLayer, ExpertStore, MAX_EXPERTS, Range, SourceFile};
use crate::ErrorKind;

fn file(bytes: u64) -> SourceFile {
    SourceFile { path: "shard".into(), bytes, modified: SystemTime::UNIX_EPOCH }
}

fn layer(experts: u32, row_bytes: u64) -> ExpertLayer {
    let ranges = |expert: u32| vec![Range { file: 0, offset: u64::from(expert) * row_bytes, bytes: row_bytes, at: 0 }];
    ExpertLayer::new("layer".into(), row_bytes, 2, &(0..experts).map(ranges).collect::<Vec<_>>())
}

#[test]
fn experts_are_counted_through_all_layers() {
    let store = ExpertStore::new(vec![file(10_000)], vec![layer(4, 100), layer(8, 300), layer(1, 200)]).unwrap();
    assert_eq!(store.experts(), 13);
    assert_eq!(store.slot_bytes(), 4096);
    for id in 0..13 {
        let (layer, expert) = store.locate(id);
        assert_eq!(store.id(layer, expert), Some(id));
    }
    assert_eq!(store.locate(4), (1, 0));
    assert_eq!(store.ranges(5), [Range { file: 0, offset: 300, bytes: 300, at: 0 }]);
    assert_eq!((store.id(0, 4), store.id(3, 0)), (None, None));
    assert_eq!((store.row_bytes(12), store.max_top_k()), (200, 2));
}

#[test]
fn a_range_outside_of_its_file_or_row_is_refused() {
    let good = Range { file: 0, offset: 0, bytes: 100, at: 0 };
    for bad in [
        Range { file: 1, ..good },
        Range { offset: 901, ..good },
        Range { offset: u64::MAX, ..good },
        Range { at: 1, ..good },
        Range { at: u64::MAX, ..good },
        Range { bytes: 101, ..good },
    ] {
        let layer = ExpertLayer::new("experts".into(), 100, 1, &[vec![good], vec![bad]]);
        let error = ExpertStore::new(vec![file(1000)], vec![layer]).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (ErrorKind::InvalidConfig, Some("experts")), "{bad:?}");
    }
    let overlap = ExpertLayer::new("experts".into(), 100, 1, &[vec![good, Range { bytes: 1, at: 99, ..good }]]);
    assert!(ExpertStore::new(vec![file(1000)], vec![overlap]).is_err());
}

#[test]
fn no_experts_and_too_many_are_refused() {
    assert!(ExpertStore::new(vec![], vec![]).is_err());
    let many = vec![vec![]; usize::try_from(MAX_EXPERTS).unwrap()];
    let layers = vec![ExpertLayer::new("a".into(), 1, 1, &many), ExpertLayer::new("b".into(), 1, 1, &[vec![]])];
    assert!(ExpertStore::new(vec![], layers).is_err());
}
