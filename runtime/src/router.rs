//! Which tokens go through which experts of a block, and what they count there.

use slim_formats::arch::{Experts, Routing, Scores};

/// What is added to a sum of scores that weights are divided by, as in transformers.
const LEAST_SUM: f32 = 1e-20;

/// The tokens that go through an expert.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Route {
    /// Which of the tokens that were routed, from the first to the last.
    pub tokens: Vec<usize>,
    /// What the expert's output for each of them is multiplied by.
    pub weights: Vec<f32>,
}

impl Route {
    /// The rows of its tokens among `x: [.., width]`.
    pub fn gather(&self, x: &[f32], width: usize) -> Vec<f32> {
        self.tokens.iter().flat_map(|&token| &x[token * width..][..width]).copied().collect()
    }

    /// Adds `bias` to `rows: [tokens, width]` of what an expert makes of weighted neurons, as often
    /// as its tokens weigh.
    pub fn add_bias(&self, bias: &[f32], rows: &mut [f32]) {
        for (row, weight) in rows.chunks_exact_mut(bias.len()).zip(&self.weights) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += weight * bias);
        }
    }

    /// Adds `factor` times `rows: [tokens, width]` to the rows of its tokens in `x: [.., width]`.
    pub fn scatter(&self, rows: &[f32], factor: f32, x: &mut [f32]) {
        let width = rows.len() / self.tokens.len().max(1);
        for (&token, row) in self.tokens.iter().zip(rows.chunks_exact(width.max(1))) {
            let x = &mut x[token * width..][..width];
            x.iter_mut().zip(row).for_each(|(x, row)| *x += factor * row);
        }
    }
}

/// The routes of all experts, for the outputs of a router, `[tokens, experts]`, which become
/// scores. `correction` is added to these where experts are chosen, `[experts]`; what each weighs
/// is multiplied by its own of `scales: [experts]`.
pub fn routes(
    experts: &Experts,
    outputs: &mut [f32],
    correction: Option<&[f32]>,
    scales: Option<&[f32]>,
) -> Vec<Route> {
    let mut routes = vec![Route::default(); experts.count.into()];
    if experts.routing.sharpness != 1.0 {
        outputs.iter_mut().for_each(|output| *output *= experts.routing.sharpness);
    }
    for (token, scores) in outputs.chunks_exact_mut(experts.count.into()).enumerate() {
        score(experts.routing.scores, scores);
        let chosen = choose(experts, scores, correction);
        for (&expert, weight) in chosen.iter().zip(weights(&experts.routing, scores, &chosen)) {
            routes[expert].tokens.push(token);
            routes[expert].weights.push(weight * scales.map_or(1.0, |scales| scales[expert]));
        }
    }
    routes
}

/// Turns a router's outputs for a token into scores, `[experts]`.
fn score(kind: Scores, outputs: &mut [f32]) {
    match kind {
        Scores::Sigmoid => outputs.iter_mut().for_each(|x| *x = sigmoid(*x)),
        Scores::Softmax => {
            let largest = outputs.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            outputs.iter_mut().for_each(|x| *x = (*x - largest).exp());
            let sum: f32 = outputs.iter().sum();
            outputs.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// The experts of a token, the best first; of equally good ones the first.
fn choose(experts: &Experts, scores: &[f32], correction: Option<&[f32]>) -> Vec<usize> {
    let mut worth = scores.to_vec();
    if let Some(correction) = correction {
        worth.iter_mut().zip(correction).for_each(|(worth, correction)| *worth += correction);
    }
    if let Some(groups) = experts.routing.groups {
        let size = scores.len() / usize::from(groups.count);
        let of_group = |group: &[f32]| {
            best(group, groups.best.into()).into_iter().map(|index| group[index]).sum()
        };
        let of_groups: Vec<f32> = worth.chunks_exact(size).map(of_group).collect();
        let left = best(&of_groups, groups.used.into());
        for (group, worth) in worth.chunks_exact_mut(size).enumerate() {
            if !left.contains(&group) {
                worth.fill(f32::NEG_INFINITY);
            }
        }
    }
    best(&worth, experts.used.into())
}

/// Where the `count` largest of `values` are, the largest first.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}

/// The weights of the chosen experts.
fn weights(routing: &Routing, scores: &[f32], chosen: &[usize]) -> Vec<f32> {
    let sum = match routing.normalizes {
        true => chosen.iter().map(|&expert| scores[expert]).sum::<f32>() + LEAST_SUM,
        false => 1.0,
    };
    chosen.iter().map(|&expert| routing.scale * scores[expert] / sum).collect()
}

/// `1 / (1 + e^-x)`.
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// What the network beside experts has of each token of `x: [tokens, hidden]`,
/// `sigmoid(share . x)`.
pub fn shares(share: &[f32], x: &[f32]) -> Vec<f32> {
    let product = |x: &[f32]| share.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
    x.chunks_exact(share.len()).map(|x| sigmoid(product(x))).collect()
}

/// Multiplies each of `rows: [weights.len(), width]` by its weight.
pub fn weigh(rows: &mut [f32], weights: &[f32]) {
    let width = rows.len() / weights.len().max(1);
    for (row, &weight) in rows.chunks_exact_mut(width.max(1)).zip(weights) {
        row.iter_mut().for_each(|value| *value *= weight);
    }
}

#[cfg(test)]
mod tests {
    use slim_formats::arch::{Activation, ExpertGroups, Ffn};

    use super::*;

    fn experts(count: u16, used: u16, routing: Routing) -> Experts {
        let ffn = Ffn { width: 8, activation: Activation::Silu, is_gated: true, has_bias: false };
        let (shares, are_fused, are_mxfp4) = (false, false, false);
        let has_norms = false;
        Experts { count, used, ffn, routing, shares, has_norms, are_fused, are_mxfp4 }
    }

    fn routing(scores: Scores, normalizes: bool) -> Routing {
        let (has_bias, is_corrected, groups, scale) = (false, false, None, 2.0);
        let sharpness = 1.0;
        Routing { sharpness, scores, has_bias, is_corrected, groups, normalizes, scale }
    }

    #[test]
    fn tokens_go_to_the_best_experts_with_their_shares() {
        let experts = experts(3, 2, routing(Scores::Softmax, true));
        let mut outputs = [0.0, 3f32.ln(), -9.0, 1.0, 0.0, 1.0];
        let routes = routes(&experts, &mut outputs, None, None);
        assert_eq!(routes[0].tokens, [0, 1]);
        assert_eq!(routes[1].tokens, [0]);
        assert_eq!(routes[2].tokens, [1]);
        let expected = [0.5, 1.0];
        assert!(routes[0].weights.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5));
        assert!((routes[1].weights[0] - 1.5).abs() < 1e-5);
    }

    #[test]
    fn corrections_choose_but_do_not_weigh() {
        let experts = experts(3, 1, routing(Scores::Sigmoid, false));
        let routes = routes(&experts, &mut [0.0, 2.0, 0.0], Some(&[0.0, 0.0, 9.0]), None);
        assert_eq!(routes[2], Route { tokens: vec![0], weights: vec![1.0] });
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        let groups = Some(ExpertGroups { count: 3, used: 1, best: 2 });
        let routing = Routing { groups, ..routing(Scores::Sigmoid, false) };
        let scores = [0.9, 0.0, 0.6, 0.5, 0.2, 0.3];
        assert_eq!(choose(&experts(6, 2, routing), &scores, None), [2, 3]);
    }

    #[test]
    fn scattered_rows_are_added_where_they_were_gathered() {
        let route = Route { tokens: vec![0, 2], weights: vec![1.0; 2] };
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let rows = route.gather(&x, 2);
        assert_eq!(rows, [1.0, 2.0, 5.0, 6.0]);
        route.scatter(&rows, -1.0, &mut x);
        assert_eq!(x, [0.0, 0.0, 3.0, 4.0, 0.0, 0.0]);
    }
}
