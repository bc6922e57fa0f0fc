//! What flanneld does with configurations, right and wrong ones.

use super::*;

/// What the original did with 73 configurations, as recorded from flanneld v0.20.2.
const RECORDED: &str = include_str!("../../../../../tests/fixtures/faults/v0.20.2/badconfig.txt");

/// The original's verdict on a recorded configuration: the network it wrote to subnet.env, or that it wrote none.
fn recordings() -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
    RECORDED.split("\n### ").skip(1).filter_map(|block| {
        let mut lines = block.lines();
        let config = lines.next()?;
        let outcome = lines.next()?;
        let network = outcome.split("FLANNEL_NETWORK=").nth(1).and_then(|rest| rest.split(' ').next());
        Some((config, network))
    })
}

#[test]
fn recorded_configurations_get_the_originals_verdict() {
    // Accepted by the original and then of no use: a random port that no peer sends to.
    const REFUSED_ON_PURPOSE: [&str; 1] =
        [r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":0}}"#];

    assert_eq!(recordings().count(), 73);
    for (text, network) in recordings() {
        let ours = NetworkConfig::parse(text);
        match (&ours, network) {
            (Ok(config), Some(network)) => {
                assert_eq!(config.v4.map(|range| range.network.to_string()), Some(network.to_owned()));
            }
            (Err(ConfigError::BackendNotBuilt { .. }), _) => {}
            (Err(_), None) => {}
            (Err(_), Some(_)) if REFUSED_ON_PURPOSE.contains(&text) => {}
            _ => panic!("{text}: the original says {network:?}, we say {ours:?}"),
        }
    }
}
