"""The contract checks that bayespass runs on itself, for rules and posteriors of your own."""

from bayespass.testing.posterior_checks import check_posterior as check_posterior
from bayespass.testing.rule_checks import RuleErrors as RuleErrors
from bayespass.testing.rule_checks import check_rule as check_rule
from bayespass.testing.rule_checks import check_rule_gradient as check_rule_gradient
