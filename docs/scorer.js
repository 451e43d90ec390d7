// Ranks the hits of the site's search: guides first, tables and records of experiments last.
Scorer = {
  score: ([docname, title, anchor, descr, score]) => {
    if (/^(guides|first-hour)/.test(docname)) return score + 3;
    if (/^(results|log|architecture|conformance)/.test(docname)) return score - 10;
    return score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
