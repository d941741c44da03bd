//! How a budget of ranks is shared out among layers by the variance of their inputs.

/// A layer that wants directions of an input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    /// Which input it reads.
    pub input: usize,
    /// Whether it is the first of those that read it.
    pub leads: bool,
    /// The highest rank that it can have.
    pub limit: usize,
}

/// Gives each of `budget` ranks to the layer with the largest share of variance left, where a layer's
/// first rank counts as the first share of its input and so on. Returns every layer's rank, in the order
/// of `claims`; among equal shares the order is PEFT's: layers that lead first. Of layers with one input
/// the leading one gets the highest rank.
pub(super) fn share_out(claims: &[Claim], shares: &[Vec<f64>], budget: usize) -> Vec<usize> {
    let leading = (0..claims.len()).filter(|i| claims[*i].leads);
    // The others follow input by input.
    let mut others: Vec<usize> = (0..claims.len()).filter(|i| !claims[*i].leads).collect();
    others.sort_by_key(|i| claims[*i].input);
    let order: Vec<usize> = leading.chain(others.iter().copied()).collect();

    let mut offers: Vec<(f64, usize)> = Vec::new();
    for i in order {
        let shares = shares.get(claims[i].input).into_iter().flatten();
        offers.extend(shares.take(claims[i].limit).map(|share| (*share, i)));
    }
    offers.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut ranks = vec![0; claims.len()];
    for (_, i) in offers.iter().take(budget) {
        ranks[*i] += 1;
    }
    for other in others {
        let lead = claims
            .iter()
            .position(|c| c.leads && c.input == claims[other].input);
        if let Some(lead) = lead
            && ranks[lead] < ranks[other]
            && ranks[other] <= claims[lead].limit
        {
            ranks.swap(lead, other);
        }
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(input: usize, leads: bool) -> Claim {
        let limit = 4;
        Claim {
            input,
            leads,
            limit,
        }
    }

    #[test]
    fn ranks_go_to_the_largest_shares() {
        let claims = [claim(0, true), claim(1, true)];
        let shares = [vec![0.5, 0.2, 0.1, 0.05], vec![0.3, 0.15, 0.12, 0.11]];
        // 0.5, 0.3, 0.2, 0.15: two each; then 0.12, 0.11, 0.1.
        assert_eq!(share_out(&claims, &shares, 4), [2, 2]);
        assert_eq!(share_out(&claims, &shares, 6), [2, 4]);
        assert_eq!(share_out(&claims, &shares, 7), [3, 4]);
        assert_eq!(share_out(&claims, &shares, 1), [1, 0]);
    }

    #[test]
    fn with_as_many_shares_as_ranks_everyone_keeps_his() {
        let claims = [claim(0, true), claim(0, false), claim(1, true)];
        let shares = [vec![0.9, 0.05], vec![0.01, 0.001]];
        assert_eq!(share_out(&claims, &shares, 6), [2, 2, 2]);
    }

    #[test]
    fn of_layers_with_one_input_the_first_gets_the_odd_rank() {
        // The second module comes first in the model and leads; the last shares its input.
        let claims = [claim(1, true), claim(0, true), claim(1, false)];
        let shares = [vec![0.5, 0.05], vec![0.4, 0.3]];
        assert_eq!(share_out(&claims, &shares, 4), [2, 1, 1]);
    }

    #[test]
    fn no_layer_gets_more_than_it_can_hold() {
        let narrow = Claim {
            limit: 1,
            ..claim(0, false)
        };
        let claims = [claim(0, true), narrow, claim(1, true)];
        let shares = [vec![0.5, 0.4, 0.3], vec![0.01, 0.01, 0.01]];
        assert_eq!(share_out(&claims, &shares, 6), [3, 1, 2]);
        let lead = Claim {
            limit: 1,
            ..claim(0, true)
        };
        let claims = [lead, claim(0, false)];
        assert_eq!(share_out(&claims, &shares, 4), [1, 3]);
    }
}
